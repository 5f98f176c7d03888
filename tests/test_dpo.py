"""Preferences: the pairs are what the chapter says, the loss is trl's, and a run is a run."""

import hashlib
import json
import math
import re
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from seeded import one_seed  # noqa: F401
from torch.nn import functional as F

import nanolm.dpo as dpo
from nanolm.__main__ import main
from nanolm.dpo import (
    DPOConfig,
    Pair,
    book_pairs,
    collate,
    dpo_loss,
    encode_pairs,
    preference_metrics,
    read_pairs,
    reference_logps,
    sequence_logps,
    train_dpo,
)
from nanolm.model import ModelConfig, Transformer
from nanolm.tokenizer import Tokenizer
from nanolm.train import TrainConfig, load_checkpoint, metrics, train

ROWS = {
    split: [json.loads(line) for line in book_pairs(split).read_text(encoding="ascii").splitlines()]
    for split in ("train", "val")
}
ALL = ROWS["train"] + ROWS["val"]
BYTES = Tokenizer(())
TINY = ModelConfig(
    vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=48, max_seq_len=128
)


# ---- the pairs ---------------------------------------------------------------------------------


def test_five_hundred_and_a_hundred_with_equal_shares():
    shares = {split: Counter(row["kind"] for row in rows) for split, rows in ROWS.items()}
    assert shares == {"train": {"kind": 275, "sense": 225}, "val": {"kind": 55, "sense": 45}}
    assert [len(read_pairs(book_pairs(split))) for split in ROWS] == [500, 100]


def test_the_files_are_part_of_the_package():
    settings = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r"package-data\]\nnanolm = \[.*\"\*\.jsonl\".*\]", settings)
    assert all(book_pairs(split).parent == Path(dpo.__file__).parent for split in ROWS)


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def alike(rows, most=0.35):
    """Prompts that share more than this part of their triples of words."""
    triples = [
        set(zip(*(words(row["prompt"])[i:] for i in range(3)), strict=False)) for row in rows
    ]
    return [
        (i, j) for i, a in enumerate(triples) for j, b in enumerate(triples[:i])
        if len(a & b) > most * min(len(a), len(b))
    ]  # fmt: skip


def test_no_two_prompts_are_alike():
    assert alike(ALL) == []
    assert alike([*ALL, ALL[7] | {"prompt": ALL[7]["prompt"].replace("fox", "hen")}]) == [(600, 7)]


def test_hardly_a_sentence_comes_twice():
    pairs_with = Counter()
    for row in ALL:
        text = f"{row['prompt']} {row['chosen']} {row['rejected']}"
        found = {part.strip() for part in re.split(r'(?<=[.!?"])\s+', text)}
        pairs_with.update(part for part in found if len(part.split()) > 3)
    again = {sentence: n for sentence, n in pairs_with.items() if n > 1}
    assert len(pairs_with) > 3000 and max(again.values()) <= 4
    assert sum(again.values()) < 0.02 * pairs_with.total()


def test_length_tells_nothing():
    for rows in ROWS.values():
        gaps = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
        longer, shorter = (sum(sign * gap > 0 for gap in gaps) for sign in (1, -1))
        assert abs(longer - shorter) < 3 * len(rows) ** 0.5  # as a coin would
        assert abs(sum(gaps) / len(gaps)) < 0.5
        both = torch.tensor(
            [[len(r[name].split()) for r in rows] for name in ("chosen", "rejected")]
        )
        means, spreads = both.float().mean(1), both.float().std(1)
        assert abs(means[0] - means[1]) < 0.5 and 0.8 < spreads[0] / spreads[1] < 1.25


def test_neither_does_a_moral_nor_the_outer_form():
    moral = re.compile(r"(Moral|Remember|So they say|My mother says): ")
    with_moral = sum(bool(moral.search(row["chosen"])) for row in ALL)
    assert with_moral > 150
    assert (
        sum(bool(moral.search(r["chosen"])) != bool(moral.search(r["rejected"])) for r in ALL) < 6
    )
    for row in ALL:
        assert row["prompt"] == row["prompt"].strip() and row["prompt"][-1] in '.?!"'
        for text in (row["chosen"], row["rejected"]):
            assert re.match(r" \S", text) and text == text.rstrip() and text[-1] in '.?!"'


def test_they_are_of_the_world_of_the_fables():
    from nanolm.data import fables

    known = {word for text in fables(2000) for word in words(text)}
    for row in ALL:
        assert len(known & set(words(row["prompt"]))) > 8


# ---- bad input ---------------------------------------------------------------------------------

GOOD = {"prompt": "The fox", "chosen": " smiled.", "rejected": " sniffed."}
BAD = {
    "{'prompt': 1}": "not JSON",
    "[1, 2]": "not an object",
    json.dumps({"prompt": "a", "chosen": "b"}): "rejected is missing",
    json.dumps(GOOD | {"chosen": ["b"]}): "chosen is list, not text",
    json.dumps(GOOD | {"rejected": "  "}): "rejected is empty",
    json.dumps(GOOD | {"rejected": " smiled."}): "the same text",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(BAD[line])) as caught:
        read_pairs(path)
    assert f"{path}, line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_text_and_what_is_no_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_pairs(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no preference pairs"):
        read_pairs(path)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("beta", -1.0), ("beta", float("nan")), ("beta", float("inf"))]
    + [("label_smoothing", 0.5), ("label_smoothing", -0.1), ("loss_type", "hinge")]
    + [("batch_size", 0), ("epochs", 0), ("lr", float("nan")), ("lr", -1.0), ("keep", 0)]
    + [("text_rows", -1)],
)
def test_a_bad_option_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=name):
        DPOConfig(**{name: value})


# ---- log-probabilities -------------------------------------------------------------------------


def some_pairs(n=5):
    """The last words of a prompt and the first of its completions, letter by letter."""
    pairs = [Pair(r["prompt"][-20 - i :], r["chosen"][: 30 + 3 * i], r["rejected"][:25])
             for i, r in enumerate(ALL[:n])]  # fmt: skip
    return encode_pairs(pairs, BYTES, TINY.max_seq_len)


def slow_logp(model, prompt, completion):
    """A token at a time: no batch, no padding, no mask and no shift."""
    total, context = 0.0, list(prompt)
    for token in completion:
        total += model(torch.tensor([context]))[0, -1].log_softmax(-1)[token].item()
        context.append(token)
    return total


@torch.no_grad()
def test_sequence_logps_are_the_sum_over_the_completion_and_nothing_else():
    model, pairs = Transformer(TINY).double(), some_pairs(2)
    slow = [slow_logp(model, p.prompt, p.chosen) for p in pairs]
    slow += [slow_logp(model, p.prompt, p.rejected) for p in pairs]
    slow = torch.tensor(slow, dtype=torch.float64)
    ids, mask = collate(pairs)
    assert torch.allclose(sequence_logps(model, ids, mask), slow, rtol=1e-9)
    ids, mask = F.pad(ids, (0, 1)), F.pad(mask, (0, 1))
    for shift in (1, -1):  # the classic bug is seen
        assert not torch.allclose(sequence_logps(model, ids, mask.roll(shift, 1)), slow, rtol=1e-4)


@torch.no_grad()
def test_neither_neighbours_nor_padding_change_a_logp():
    model, pairs = Transformer(TINY).double(), some_pairs(5)
    together = sequence_logps(model, *collate(pairs))
    for i, pair in enumerate(pairs):
        assert torch.allclose(sequence_logps(model, *collate([pair])), together[[i, 5 + i]])
    ids, mask = collate(pairs)
    noise = torch.randint(257, (10, 20))
    longer = torch.cat([ids, noise], 1), torch.cat([mask, torch.zeros(10, 20).bool()], 1)
    assert torch.allclose(sequence_logps(model, *longer), together)


def test_collate_lays_chosen_over_rejected():
    pairs = [dpo.PairIds([1, 2], [3], [4, 5]), dpo.PairIds([6], [7, 8, 9], [10])]
    ids, mask = collate(pairs)
    assert ids.tolist() == [[1, 2, 3, 0], [6, 7, 8, 9], [1, 2, 4, 5], [6, 10, 0, 0]]
    marked = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
    assert marked == [[3], [7, 8, 9], [4, 5], [10]]


def test_long_prompts_lose_their_beginning_and_hopeless_pairs_go():
    said = []
    pairs = [
        Pair("abcdefgh", "xyz", "uv"),
        Pair("ab", "x", "y"),
        Pair("ab", "x" * 8, "y"),
        Pair("", "x", "y"),
    ]
    found = encode_pairs(pairs, BYTES, 8, said.append)
    end = BYTES.end_of_text
    texts = [(BYTES.decode(p.prompt), BYTES.decode(p.chosen[:-1])) for p in found]
    assert texts == [("defgh", "xyz"), ("ab", "x"), ("<|endoftext|>", "x")]
    assert all(p.chosen[-1] == p.rejected[-1] == end for p in found)
    assert all(len(p.prompt + p.chosen) <= 9 for p in found)
    assert "1 of 4 prompts" in said[0] and "from the left" in said[0] and "1 of 4 pairs" in said[1]
    with pytest.raises(ValueError, match="no pair fits"):
        encode_pairs(pairs[2:3], BYTES, 8, said.append)


# ---- the loss ----------------------------------------------------------------------------------


def slow_loss(w, lo, ref_w, ref_lo, beta, smoothing=0.0):
    """Bradley and Terry, word for word, one pair at a time in Python's floats."""
    reward_w, reward_lo = beta * (w - ref_w), beta * (lo - ref_lo)
    p = math.exp(reward_w) / (math.exp(reward_w) + math.exp(reward_lo))
    return -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradient_are_those_of_the_slow_one(beta, smoothing):
    logps = [x.requires_grad_() for x in torch.randn(4, 9, dtype=torch.float64).mul(5).unbind()]
    losses, chosen, rejected = dpo_loss(*logps, beta=beta, label_smoothing=smoothing)
    rows = list(zip(*(x.tolist() for x in logps), strict=True))
    slow = torch.tensor([slow_loss(*row, beta, smoothing) for row in rows], dtype=torch.float64)
    assert torch.allclose(losses, slow, rtol=1e-10)
    grads = torch.autograd.grad(losses.sum(), logps[:2])
    for k, grad in enumerate(grads):  # by differences
        for i, row in enumerate(rows):
            up, down = (list(row) for _ in range(2))
            up[k] += 1e-5
            down[k] -= 1e-5
            slope = (slow_loss(*up, beta, smoothing) - slow_loss(*down, beta, smoothing)) / 2e-5
            assert abs(grad[i].item() - slope) < 1e-8
    assert torch.equal(grads[0], -grads[1])
    assert torch.allclose(chosen, beta * (logps[0] - logps[2])) and not chosen.requires_grad
    assert torch.allclose(rejected, beta * (logps[1] - logps[3]))


def test_values_by_hand():
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, -11.0, -11.5)]
    assert dpo_loss(*numbers)[0].item() == pytest.approx(0.6209570, abs=1e-7)  # ln(1 + e^-0.15)
    assert dpo_loss(*numbers, loss_type="ipo")[0].item() == pytest.approx(3.5**2)  # 1.5 - 5
    smooth = dpo_loss(*numbers, label_smoothing=0.25)[0].item()
    assert smooth == pytest.approx(0.75 * 0.6209570 + 0.25 * 0.7709570, abs=1e-7)


def test_extreme_margins_stay_numbers():
    big = torch.tensor([1e5], requires_grad=True)
    for sign in (1, -1):
        loss = dpo_loss(sign * big, torch.zeros(1), torch.zeros(1), torch.zeros(1))[0]
        (grad,) = torch.autograd.grad(loss, big)
        assert loss.isfinite() and grad.isfinite()


class TrlStub(SimpleNamespace):
    """As much of a DPOTrainer as its own `_compute_loss` asks for."""

    def __init__(self, loss_type, beta, **more):
        same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        super().__init__(
            model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False,
            ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
            loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
            use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1, args=None, **more,
        )  # fmt: skip


def trl_forward(model):
    """Our model, answering as a model does that trl has patched."""

    def forward(*, input_ids, labels, **_):
        logps = model(input_ids[:, :-1]).log_softmax(-1)
        wanted = labels[:, 1:]
        picked = logps.gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * (wanted != -100)
        zeros = torch.zeros_like(picked)
        more = dict(entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros)
        return SimpleNamespace(log_probs=picked, **more)

    return forward


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_gradients_and_metrics_are_those_of_trl(loss_type):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    model, pairs = Transformer(TINY).double(), some_pairs(4)
    if loss_type == "ipo":  # trl's is a mean over the tokens: the same where there is one
        pairs = [dpo.PairIds(p.prompt, p.chosen[3:4], p.rejected[5:6]) for p in pairs]
    ids, mask = collate(pairs)
    reference = torch.randn(8, dtype=torch.float64) + sequence_logps(model, ids, mask).detach()
    chosen, rejected = sequence_logps(model, ids, mask).chunk(2)
    options = dict(beta=0.3, loss_type=loss_type)
    losses, *rewards = dpo_loss(chosen, rejected, *reference.chunk(2), **options)
    ours = torch.autograd.grad(losses.mean(), list(model.parameters()))

    stub = TrlStub(loss_type, 0.3)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=mask.long())
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference.chunk(2), strict=True))
    theirs = trainer.DPOTrainer._compute_loss(stub, trl_forward(model), inputs, False)
    assert torch.allclose(losses.mean(), theirs, rtol=1e-12)
    for a, b in zip(ours, torch.autograd.grad(theirs, list(model.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    logged, found = stub._metrics["train"], preference_metrics(losses.detach(), *rewards)
    names = ("chosen_reward", "chosen"), ("rejected_reward", "rejected")
    for mine, yours in (*names, ("margin", "margins"), ("accuracy", "accuracies")):
        assert found[mine] == pytest.approx(logged[f"rewards/{yours}"][0], rel=1e-5)


def test_a_level_pair_is_half_right():
    zero = torch.zeros(4)
    assert preference_metrics(zero, zero, zero)["accuracy"] == 0.5
    rewards = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, 0.0, 0.0])
    found = preference_metrics(torch.tensor([1.0, 2.0, 6.0]), *rewards)
    assert found["accuracy"] == 0.5 and found["loss"] == 3
    assert found["margin"] == pytest.approx(-1 / 3)


# ---- the reference, on disk --------------------------------------------------------------------


def test_the_reference_is_asked_once_and_a_stale_file_refused(tmp_path, monkeypatch):
    model, pairs, path = Transformer(TINY), some_pairs(5), tmp_path / "reference.json"
    first = reference_logps(model, [pairs[:3], pairs[3:]], path, 2)
    assert first.shape == (5, 2)
    slow = torch.tensor([[slow_logp(model, p.prompt, x) for x in p[1:]] for p in pairs[3:4]])
    assert torch.allclose(first[3:4], slow, rtol=1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "pair_logps", None)  # nobody may compute again
        assert torch.equal(reference_logps(model, [pairs[:3], pairs[3:]], path, 2), first)
    for other in ([pairs[:2], pairs[2:]], [pairs[:3], pairs[3:][::-1]]):
        with pytest.raises(ValueError, match="stale"):
            reference_logps(model, other, path, 2)
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    with pytest.raises(ValueError, match="stale"):
        reference_logps(model, [pairs[:3], pairs[3:]], path, 2)
    for damage in (path.read_text().replace("-", "", 1), path.read_text()[:-9], "[]"):
        path.write_text(damage)
        with pytest.raises(ValueError, match="damaged"):
            reference_logps(model, [pairs[:3], pairs[3:]], path, 2)


def test_divergence_is_that_of_the_definition():
    one, two = (Transformer(TINY).double() for _ in range(2))
    ids, mask = collate(some_pairs(2))
    found = dpo.kl_divergence(one, two, ids, mask)
    with torch.no_grad():
        p, q = (m(ids).softmax(-1) for m in (one, two))
    spots = [(b, t - 1) for b, t in mask.nonzero().tolist()]
    slow = torch.stack([(p[s] * (p[s] / q[s]).log()).sum() for s in spots])
    assert torch.allclose(found, slow) and (slow > 0).all()


# ---- a run -------------------------------------------------------------------------------------

SHAPE = ModelConfig(
    vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=48, max_seq_len=96
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A finished run to begin from."""
    torch.set_num_threads(1)
    pace = TrainConfig(
        name="fox", runs_dir=str(tmp_path_factory.mktemp("runs")), data=("fables:60",), steps=20,
        batch_size=4, lr=3e-3, warmup_steps=2, eval_every=0, sample_every=0, val_fraction=0.3,
    )  # fmt: skip
    return train(SHAPE, pace, log=quiet)


@pytest.fixture
def config(tmp_path) -> DPOConfig:
    """Forty pairs that are easily told apart, and ten to be examined on."""
    lines = [
        {"prompt": f"The hen met number {i}.", "chosen": f" She was kind to {i}.",
         "rejected": f" Bang went {i}!"}
        for i in range(50)
    ]  # fmt: skip
    for name, part in (("pairs", lines[:40]), ("held", lines[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part))
    return DPOConfig(
        pairs=str(tmp_path / "pairs.jsonl"), held_out=str(tmp_path / "held.jsonl"), batch_size=3,
        runs_dir=str(tmp_path), lr=3e-3, embedding_lr=1.0, sft_lr=0.0, warmup_steps=2,
        eval_every=5, checkpoint_every=5, log_every=1,
    )  # fmt: skip


def quiet(line):
    pass


def files_of(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def state_of(run):
    saved = load_checkpoint(run, optimizer=True)
    return saved.step, saved.model.state_dict() | saved.optimizer, metrics(run)


def assert_same(one, other):
    (step, tensors, rows), (step2, tensors2, rows2) = state_of(one), state_of(other)
    assert step == step2 and rows == rows2 and tensors.keys() == tensors2.keys()
    assert all(torch.equal(tensors[name], tensors2[name]) for name in tensors)


def test_a_run_learns_what_is_preferred_and_leaves_its_source_alone(source, config):
    before = files_of(source)
    run = train_dpo(source, config, log=quiet)
    assert files_of(source) == before and run.name == "fox-dpo"
    rows = metrics(run)
    steps = [row for row in rows if "lr" in row]
    assert [row["step"] for row in steps] == list(range(1, 15)) and steps[0][
        "loss"
    ] == pytest.approx(math.log(2), abs=1e-3)
    tests = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in tests] == [0, 5, 10, 14]
    first, last = tests[0], tests[-1]
    assert first["val_accuracy"] == 0.5 and first["kl"] == 0 and first["val_margin"] == 0
    assert last["val_accuracy"] > 0.9 and last["kl"] > 0 and last["val_margin"] > 0
    assert last["val_margin"] == pytest.approx(
        last["val_chosen_reward"] - last["val_rejected_reward"], abs=1e-5
    )
    assert first["text_loss"] > 0
    assert load_checkpoint(run).step == 14


def test_the_reference_reads_first_and_is_a_run(source, config):
    before, said = files_of(source), []
    run = train_dpo(source, replace(config, sft_lr=1e-2), log=said.append)
    assert "reading" in said[0] and files_of(source) == before
    read, old = load_checkpoint(run / "reference").model, load_checkpoint(source).model
    pairs = encode_pairs(read_pairs(config.pairs), load_checkpoint(run).tokenizer, 96)
    gains = dpo.pair_logps(read, pairs) - dpo.pair_logps(old, pairs)
    assert (gains[:, 0] > 5).all()
    kept = json.loads((run / "reference.json").read_text())["logps"][:40]
    assert torch.allclose(torch.tensor(kept), dpo.pair_logps(read, pairs, 3), atol=1e-3)
    first, second = [row for row in metrics(run) if "text_loss" in row][:2]
    assert (first["step"], second["step"]) == (-1, 0) and second["text_loss"] != first["text_loss"]
    assert second["kl"] == 0 and second["val_accuracy"] == 0.5


def test_reading_keeps_hold_of_the_old_text(source, config):
    texts = [dpo.source_text(source, split, 8, 96) for split in ("train", "val")]
    pairs = encode_pairs(read_pairs(config.pairs), load_checkpoint(source).tokenizer, 96)
    losses = []
    for text in (texts[0], None):
        model = load_checkpoint(source).model
        dpo.read_chosen(model, pairs, text, replace(config, sft_lr=1e-2))
        losses.append(dpo.text_loss(model, texts[1])["text_loss"])
    assert losses[0] < losses[1] - 0.1
    assert dpo.text_loss(model, None) == {}


def test_old_text_beside_the_pairs_is_kept_in_mind(source, config):
    losses, steps = {}, {}
    for rows in (0, 2):
        given = replace(config, name=f"{rows}", text_rows=rows, lr=1e-2)
        found = metrics(train_dpo(source, given, log=quiet))
        losses[rows] = [row["text_loss"] for row in found if "text_loss" in row][-1]
        steps[rows] = [row for row in found if "grad_norm" in row]
    assert losses[2] < losses[0] - 0.1
    assert [s[0]["loss"] for s in steps.values()] == [pytest.approx(math.log(2), abs=1e-3)] * 2
    assert steps[0][0]["grad_norm"] != steps[2][0]["grad_norm"]  # but its gradient is there


def test_a_step_adds_the_loss_of_one_window_that_no_other_step_has(source, config):
    given = replace(config, text_rows=1, lr=0.0)
    run = dpo.open_dpo(source, given, False, quiet)
    seen, whole = [], run.model.loss
    run.model.loss = lambda x, y: seen.append((x, y)) or whole(x, y)
    for step in range(3):
        want = whole(*(part for part in run.old.batch(step)))
        rows = run.batch(step)
        want = want + dpo.losses_of(run, [run.pairs[i] for i in rows], run.logps[rows])[0].mean()
        grads = torch.autograd.grad(want, list(run.model.parameters()))
        dpo.dpo_step(run)
        for p, grad in zip(run.model.parameters(), grads, strict=True):
            assert torch.allclose(p.grad, grad, atol=1e-6)
    assert [x.shape for x, _ in seen] == [(1, 96)] * 3
    assert len({tuple(x[0].tolist()) for x, _ in seen}) == 3
    val = dpo.source_text(source, "val", 1, 96)
    assert len(run.old.data) > len(val.data)  # what it was trained on, not what it is tested on


def test_without_the_old_text_the_pairs_are_enough(source, config, monkeypatch):
    assert dpo.open_dpo(source, replace(config, text_rows=0), False, quiet).old is None
    monkeypatch.setattr(dpo, "source_text", lambda *a: None)
    run = train_dpo(source, replace(config, name="alone", text_rows=3, sft_lr=1e-3), log=quiet)
    assert not any("text_loss" in row for row in metrics(run)) and load_checkpoint(run).step == 14


def test_a_run_from_before_there_was_old_text_goes_on_without(source, config):
    run = train_dpo(source, replace(config, text_rows=0), log=quiet)
    path = run / "config.json"
    old = json.loads(path.read_text())
    del old["dpo"]["text_rows"]
    path.write_text(json.dumps(old))
    assert dpo.load_dpo(run) == replace(config, text_rows=0)
    with pytest.raises(ValueError, match="text_rows is 0"):
        train_dpo(source, replace(config, text_rows=1), resume=True, log=quiet)


def test_reading_is_clipped_whatever_the_pairs_are(source, config, monkeypatch):
    limits, clip = [], dpo.clip_grad_norm
    monkeypatch.setattr(dpo, "clip_grad_norm", lambda ps, m: limits.append(m) or clip(ps, m))
    loaded = load_checkpoint(source)
    pairs = encode_pairs(read_pairs(config.pairs), loaded.tokenizer, 96)
    for limit in (0.0, 7.0):
        dpo.read_chosen(loaded.model, pairs, None, replace(config, sft_lr=1e-3, grad_clip=limit))
    assert limits == [1.0] * 10


def test_no_step_is_cut_unless_asked(source, config):
    assert DPOConfig().grad_clip == 0
    sizes = defaultdict(list)
    for limit in (0.0, 1e-3):
        for h in (30.0, -30.0):  # pairs long settled, pairs all wrong
            given = replace(config, name=f"{limit} {h}", grad_clip=limit, text_rows=0)
            run = dpo.open_dpo(source, given, False, quiet)
            run.logps[:, 0] -= h
            row = dpo.dpo_step(run)
            grads = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
            sizes[limit].append(torch.stack(grads).norm().item())
            assert limit or row["grad_norm"] == pytest.approx(sizes[limit][-1], rel=1e-4)
    settled, wrong = sizes[0.0]
    assert settled / wrong == pytest.approx(math.exp(-3), rel=1e-2)  # sigma(-3) / sigma(3)
    assert sizes[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_each_pair_is_seen_once_an_epoch(source, config):
    run = dpo.open_dpo(source, replace(config, epochs=2), False, quiet)
    orders = [[i for s in range(k * 14, k * 14 + 14) for i in run.batch(s)] for k in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]
    assert run.steps == 28 and len(run.batch(13)) == 1


class Crash(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize(("step", "sft_lr"), [(2, 0.0), (7, 1e-3), (14, 0.0)])
def test_a_run_cut_off_and_resumed_is_the_uninterrupted_run(source, config, step, sft_lr):
    config = replace(config, sft_lr=sft_lr)

    def log(line):
        if line.startswith(f"step {step:02d}/"):
            raise Crash

    whole = train_dpo(source, replace(config, name="whole"), log=quiet)
    with pytest.raises(Crash):
        train_dpo(source, config, log=log)
    assert_same(train_dpo(source, config, resume=True, log=quiet), whole)


def test_ctrl_c_saves_and_says_how_to_go_on(source, config):
    said = []

    def press(line):
        said.append(line)
        if line.startswith("step 03/"):
            signal.raise_signal(signal.SIGINT)

    whole = train_dpo(source, replace(config, name="whole"), log=quiet)
    run = train_dpo(source, config, log=press)
    assert load_checkpoint(run).step == 4 and "--resume" in said[-1]
    assert_same(train_dpo(source, config, resume=True, log=quiet), whole)


def test_where_the_new_run_goes(monkeypatch, tmp_path):
    (tmp_path / "fox/step-000003").mkdir(parents=True)
    plain = DPOConfig()
    assert dpo.dpo_folder("runs/fox", plain) == Path("runs/fox-dpo")
    assert dpo.dpo_folder("runs/fox/step-000100", plain) == Path("runs/fox-dpo")
    assert dpo.dpo_folder("fox", DPOConfig(name="hen", runs_dir="out")) == Path("out/hen")
    for inside in ("fox", "fox/step-000003"):
        monkeypatch.chdir(tmp_path / inside)
        found = dpo.dpo_folder("." if inside == "fox" else "../step-000003", plain)
        assert found == tmp_path / "fox-dpo"


def test_resume_refuses_what_has_changed(source, config, tmp_path):
    with pytest.raises(FileNotFoundError):
        train_dpo(source, config, resume=True, log=quiet)
    run = train_dpo(source, config, log=quiet)
    with pytest.raises(ValueError, match="already holds a run"):
        train_dpo(source, config, log=quiet)
    with pytest.raises(ValueError, match="beta"):
        train_dpo(source, replace(config, beta=0.2), resume=True, log=quiet)
    pairs = Path(config.pairs)
    pairs.write_text(pairs.read_text().replace("hen", "cat"))
    with pytest.raises(ValueError, match="stale"):
        train_dpo(source, config, resume=True, log=quiet)
    with pytest.raises(ValueError, match="not of a run that nanolm dpo began"):
        dpo.load_dpo(source)
    assert run.is_dir()


def test_a_loss_that_is_no_number_is_refused(source, config, monkeypatch):
    real = dpo.dpo_loss
    monkeypatch.setattr(dpo, "dpo_loss", lambda *a, **k: [x * math.nan for x in real(*a, **k)])
    with pytest.raises(ValueError, match="not finite at step 1: .*--lr"):
        train_dpo(source, config, log=quiet)


def test_pairs_without_a_held_out_file_give_a_tenth(source, config):
    run = dpo.open_dpo(source, replace(config, held_out=""), False, quiet)
    assert (len(run.pairs), len(run.held_out)) == (36, 4)
    with pytest.raises(ValueError, match="pairs"):
        few = Path(config.pairs)
        few.write_text("".join(few.read_text().splitlines(keepends=True)[:9]))
        dpo.open_dpo(source, replace(config, held_out="", name="b"), False, quiet)


def test_a_full_disk_says_how_to_go_on(source, config, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dpo, "save_checkpoint", full)
    with pytest.raises(OSError, match="step 5: .*No space.*nanolm dpo .*--resume"):
        train_dpo(source, config, log=quiet)


# ---- the command -------------------------------------------------------------------------------


def spoken(capsys, *argv):
    """A command's exit code, and what it printed."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_trains_resumes_and_the_result_can_be_sampled(source, config, capsys):
    own = ["--pairs", config.pairs, "--held-out", config.held_out, "--runs-dir", config.runs_dir]
    pace = "--warmup-steps 2 --lr 3e-3 --batch-size 8 --log-every 1".split()
    code, out, _ = spoken(capsys, "dpo", source, *own, *pace)
    run = Path(config.runs_dir) / "fox-dpo"
    assert (
        code == 0 and "step 5/5" in out and "held out" in out and "after" in out and str(run) in out
    )
    code, out, _ = spoken(capsys, "dpo", source, "--runs-dir", config.runs_dir, "--resume")
    assert code == 0 and "finished" in out
    code, out, _ = spoken(capsys, "sample", run, "--prompt", "The hen", "--max-tokens", 5)
    assert code == 0 and out.startswith("The hen")
    code, out, _ = spoken(capsys, "plot", run)
    assert code == 0


@pytest.mark.parametrize("line", BAD)
def test_the_command_refuses_bad_pairs_in_one_line(line, source, config, capsys):
    Path(config.pairs).write_text(f"{json.dumps(GOOD)}\n{line}\n")
    argv = "dpo", source, "--pairs", config.pairs, "--runs-dir", config.runs_dir
    code, _, err = spoken(capsys, *argv)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "line 2" in err
    assert not (Path(config.runs_dir) / "fox-dpo").exists()


def test_the_command_refuses_bad_options_in_one_line(source, config, capsys):
    for words, said in (
        (["--beta", "0"], "beta"),
        (["--betta", "1"], "did you mean --beta"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--resume"], "no run"),
        (["--warmup-steps", "99"], "warmup_steps"),
        (["--device", "cuda:77"], "device"),
    ):
        code, _, err = spoken(capsys, "dpo", source, "--runs-dir", config.runs_dir, *words)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    assert spoken(capsys, "dpo", "nowhere")[0] == 2
