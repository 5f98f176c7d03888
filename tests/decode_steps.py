"""Times single steps of the decoder on a GPU, in all the ways that the chapter compares.

    python tests/decode_steps.py KEPT.json sweep
    python tests/decode_steps.py KEPT.json steps
    python tests/decode_steps.py KEPT.json reading

`sweep` times the plans beside each other; `steps` adds the ways from the plain loop to the kernels,
with the fastest plans; `reading` times prompts of several lengths, read both ways. A number in
their place runs one plan and keeps nothing, so that several processes can compile for the others.
"""

import json
import sys
import time
from pathlib import Path

import torch

from nanolm.bench import machine
from nanolm.decode import Decoder, Plan, choose_plan
from nanolm.model import ModelConfig, Transformer
from nanolm.sample import SampleConfig, generate_ids

module = sys.modules["nanolm.decode"]  # the package hands out the function of that name
GREEDY, DRAWN = SampleConfig(temperature=0.0), SampleConfig(seed=1)
FILTERED = SampleConfig(top_k=50, top_p=0.9, seed=1)
ONE = [Plan(8, BT=BT, num_warps=warps) for BT in (256, 512) for warps in (8, 16)]
ONE += [Plan(8, BT=128), Plan(8, BT=128, num_warps=4)]
SOME = [Plan(4), Plan(4, BT=128, BF=64)]
MANY = [Plan(2, BT=BT, num_warps=warps) for BT in (256, 128, 64) for warps in (8, 16)]
MANY += [Plan(2, BT=128, num_warps=4), Plan(2, BT=128, BF=64)]
MANY += [Plan(2, BT=128, BF=64, WORDS=words) for words in (32, 128)] + [Plan(1, num_warps=16)]
MANY += [Plan(4, BT=BT, maxnreg=128) for BT in (128, 256)]
SWEEP = [(plan, B) for B, plans in ((1, ONE), (32, SOME), (64, MANY)) for plan in plans]


def some_model():
    """The default model in bfloat16, far enough from its birth for logits to differ."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig())
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    return model.to("cuda", torch.bfloat16)


def step_us(model, B, config=GREEDY, start=17, steps=256, chunk=64, **options):
    """Microseconds of a step, the median of 3 runs of `steps` of B texts after `start` tokens."""
    decoder, found = Decoder(model, B, **options), []
    prompts = torch.randint(32000, (B, start)).tolist()
    for _ in range(4):
        decoder.put(range(B), prompts, [config] * B)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        ids = [decoder.steps(chunk) for _ in range(steps // chunk)]
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - begin) / steps)
        assert not (torch.cat(ids) < 0).any()
    return sorted(found[1:])[1]


def loop_us(model, n=64):
    """Microseconds of a token of the plain loop."""
    found = []
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        list(generate_ids(model, [1] * 17, SampleConfig(max_tokens=n, temperature=0.0)))
        found.append(1e6 * (time.perf_counter() - begin) / n)
    return found[1]


@torch.inference_mode()
def reading_ms(model, B, tokens, short):
    """Milliseconds to read B prompts, the median of 7; by steps, if not above `short` tokens."""
    decoder, found = Decoder(model, B), []
    where, ids = torch.arange(B, device="cuda"), torch.randint(32000, (B, tokens), device="cuda")
    before, module.SHORT = module.SHORT, short
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        decoder.engine.read(where, ids)
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - begin))
    module.SHORT = before
    return sorted(found[3:])[3]


def ways(config, one, many):
    """Every way of the chapter but the loop: its name, how many texts, and options to time it."""
    for B, plan in ((1, one), (64, many)):
        yield "plain PyTorch, merged", B, {"kernels": False, "steps": 64, "chunk": 32}
        yield "a launch for each half", B, {"plan": plan._replace(SPLIT=True)}
        yield f"teams of {plan.G}", B, {"plan": plan}
        yield "  and draws", B, {"plan": plan, "config": DRAWN}
        yield "  and filters", B, {"plan": plan, "config": FILTERED}
        yield "  near the end", B, {"plan": plan, "start": 256}
    for G in (1, 2, 4):
        yield f"teams of {G}", 1, {"plan": one._replace(G=G)}
    for B in (4, 16, 32, 128, 256):
        yield f"teams of {choose_plan(config, B, torch.device('cuda')).G}", B, {}


def main(path, work):
    kept = json.loads(path.read_text()) if path.exists() else {}
    model = some_model()
    if work.isdigit():  # one of the plans, to have it compiled
        plan, B = SWEEP[int(work)]
        step_us(model, B, plan=plan, steps=64)
        return
    if work == "reading":
        rows = [{"texts": B, "tokens": n} for B in (1, 64) for n in (15, 31, 63)]
        for row in rows:
            for name, short in (("whole", 0), ("steps", 99)):
                row[name] = round(reading_ms(model, row["texts"], row["tokens"], short), 2)
        about = machine()
        known = {"date": about["date"], "machine": about["machine"], "rows": rows}
        kept["reading"] = kept.get("reading", {}) | known
        path.write_text(json.dumps(kept, indent=1))
        return
    kept |= {"what": "steps of the decoder", "command": "python tests/decode_steps.py"} | machine()
    if work == "sweep":
        kept["sweep"] = [
            {"plan": plan, "texts": B, "us": step_us(model, B, plan=plan)} for plan, B in SWEEP
        ]
        path.write_text(json.dumps(kept))
    best = {
        B: min((row for row in kept["sweep"] if row["texts"] == B), key=lambda row: row["us"])
        for B in (1, 64)
    }
    print({B: row for B, row in best.items()}, flush=True)
    if work == "steps":
        kept["rows"] = [{"way": "the loop", "texts": 1, "us": loop_us(model)}]
        plans = (Plan(*best[B]["plan"]) for B in (1, 64))
        for name, B, options in ways(model.config, *plans):
            row = {"way": name, "texts": B}
            try:
                row["us"] = step_us(model, B, **options)
            except Exception as error:
                row["skipped"] = repr(error)[:200]
            kept["rows"].append(row)
            print(row, flush=True)
            path.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
