"""The NaN detective: crimes committed at known places and steps, and what it says of them."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from place import on_gpu
from seeded import one_seed  # noqa: F401
from torch import nn

import nanolm.debug as debug
from nanolm.checkpoint import pack_optimizer
from nanolm.data import Batches, TokenData, prepare, read_documents
from nanolm.debug import Reading, Report, Watch, first_bad, measure, plot_ranges, replay
from nanolm.model import ModelConfig, Transformer
from nanolm.optim import AdamW, decay_groups
from nanolm.step import GraphedStep, Passes
from nanolm.tokenizer import Tokenizer
from nanolm.train import MAX_SKIPPED, TrainConfig, load_checkpoint, metrics, train

MODEL = ModelConfig(
    vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=48, max_seq_len=32
)
INF, NAN = math.inf, math.nan
ROOT = Path(__file__).resolve().parent.parent


def some_batch(rows=3):
    ids = torch.randint(MODEL.vocab_size, (rows, 17))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# ---- readings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "values, expected",
    [
        ([3.0, -2.0, 1.0], (-2.0, 3.0, 0, 0)),
        ([NAN, INF, -INF, 5.0, NAN], (5.0, 5.0, 2, 2)),
        ([NAN], (INF, -INF, 1, 0)),
        ([-INF, INF], (INF, -INF, 0, 2)),
    ],
)
def test_a_measurement_is_of_the_finite_numbers_and_counts_the_rest(values, expected, dtype):
    for x in (torch.tensor(values, dtype=dtype), torch.tensor([values] * 2, dtype=dtype)):
        times = x.numel() // len(values)
        low, high, nan, inf = measure(x).tolist()
        assert (low, high, nan, inf) == (*expected[:2], times * expected[2], times * expected[3])


def test_a_reading_in_words():
    good = Reading("blocks.0", "output", (2, 3), -1.5, 2.0, 0, 0)
    assert str(good) == "the output of blocks.0: -1.5 to 2" and not good.bad and good.peak == 2.0
    bad = Reading("", "loss", (), INF, -INF, 1, 0)
    assert str(bad) == "the loss: nothing finite, 1 NaN and 0 infinite of 1"
    assert bad.bad and bad.peak == 0.0


# ---- the watch ---------------------------------------------------------------------------------

PLACES = [  # all that a block computes, in order
    ("embedding", "output"), ("blocks.0.attn_norm", "output"), ("blocks.0.attn.q_proj", "output"),
    ("blocks.0.attn.k_proj", "output"), ("blocks.0.attn.v_proj", "output"),
    ("blocks.0.attn.o_proj", "input"), ("blocks.0.attn.o_proj", "output"),
    ("blocks.0.mlp_norm", "input"), ("blocks.0.mlp_norm", "output"),
    ("blocks.0.mlp.gate_proj", "output"), ("blocks.0.mlp.up_proj", "output"),
    ("blocks.0.mlp.down_proj", "input"), ("blocks.0.mlp.down_proj", "output"),
    ("blocks.0", "output"), ("blocks.1.attn_norm", "output"), ("norm", "output"), ("", "loss"),
]  # fmt: skip


def test_the_order_is_that_of_execution():
    model = Transformer(MODEL)
    readings = replay(model, model.loss, [some_batch()])
    seen = [r[:2] for r in readings]
    there = [seen.index(place) for place in PLACES]
    assert there == sorted(there)
    back = [seen.index((where, f"gradient of the {what}")) for where, what in PLACES]
    parallel = {1, 2, 3, 4, 8, 9, 10}  # their order on the way back is autograd's own
    line = [i for n, i in enumerate(back) if n not in parallel]
    assert line == sorted(line, reverse=True) and min(back) > max(there)
    assert len(seen) == len(set(seen))
    assert ("blocks.0.attn.q_proj", "input") not in seen  # which is what the norm gave, noted there
    assert ("blocks.1.attn_norm", "input") not in seen
    weights = [name for name, _ in model.named_parameters()]
    assert [r.where for r in readings if r.what == "value"] == weights
    assert sorted(r.where for r in readings if r.what == "gradient") == sorted(weights)


def test_readings_are_the_tensors():
    model, (x, y) = Transformer(MODEL), some_batch()
    readings = {r[:2]: r for r in replay(model, model.loss, [(x, y)])}
    hidden, loss = model.hidden(x), model.loss(x, y)
    loss.backward()
    reading = readings["norm", "output"]
    assert (reading.low, reading.high) == (hidden.min().item(), hidden.max().item())
    assert reading.shape == hidden.shape and readings["", "loss"].high == loss.item()
    for name, weight in model.named_parameters():
        reading = readings[name, "gradient"]
        assert (reading.low, reading.high) == (weight.grad.min().item(), weight.grad.max().item())


def spoiled(module, given, found):
    return found * torch.where(torch.arange(found.size(-1)) == 1, NAN, 1.0)


def spoil_gradient(module, given, found):
    found.register_hook(lambda grad: spoiled(None, None, grad))


MODULES = [name for name, _ in Transformer(MODEL).named_modules() if name and name != "blocks"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_crime_is_found_where_it_was_committed(name, way):
    if way == "backward" and name.endswith(("attn", "mlp")):
        pytest.skip("what it gives is noted as the output of its last projection")
    model = Transformer(MODEL)
    crime = spoiled if way == "forward" else spoil_gradient
    model.get_submodule(name).register_forward_hook(crime)
    readings = replay(model, model.loss, [some_batch()])
    first = readings[first_bad(readings)]
    assert first[:2] == (name, "output" if way == "forward" else "gradient of the output")
    assert first.nan == math.prod(first.shape) // first.shape[-1] and first.inf == 0


@pytest.mark.parametrize("name", [name for name, _ in Transformer(MODEL).named_parameters()])
def test_a_weight_that_is_not_finite_is_named_itself(name):
    model = Transformer(MODEL)
    model.get_parameter(name).data.view(-1)[3] = INF
    readings = replay(model, model.loss, [some_batch()])
    first = readings[first_bad(readings)]
    assert first[:2] == (name, "value") and (first.nan, first.inf) == (0, 1)


def test_attention_that_divides_zero_by_zero_is_found_behind_the_projections():
    def naive(q, k, v, **options):
        scores = (q @ k.repeat_interleave(2, 1).mT - 1e4).exp().tril()
        return scores / scores.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)

    model = Transformer(MODEL)
    with mock.patch("nanolm.model.attention", naive):
        readings = replay(model, model.loss, [some_batch()])
    assert readings[first_bad(readings)][:2] == ("blocks.0.attn.o_proj", "input")


def test_a_replay_leaves_no_trace():
    model, (x, y) = Transformer(MODEL), some_batch()
    model.loss(x, y).backward()
    before = [(p.clone(), p.grad, p.grad.clone()) for p in model.parameters()]
    micro = [some_batch(), some_batch()]
    first = replay(model, model.loss, micro)
    assert first == replay(model, model.loss, micro)
    for p, (value, grad, copy) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is grad and torch.equal(grad, copy)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(ZeroDivisionError):
        replay(model, lambda x, y: 1 / 0, micro)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is old[1] for p, old in zip(model.parameters(), before, strict=True))


def test_any_module_can_be_watched():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with Watch(net) as watch:
        net(torch.randn(5, 3)).sum().backward()
    names = [r.name for r in watch.readings()]
    assert "the gradient of the output of 1" in names and "the gradient of 2.bias" in names


# ---- the report --------------------------------------------------------------------------------


def a_report(bad=True, **facts):
    def rows(size, nan=0):
        return [
            Reading("blocks.0", "output", (2, 4), -size, size / 2, 0, 0),
            Reading("blocks.1", "output", (2, 4), -2 * size, size, nan, 0),
        ]

    return Report(4, "plainly", rows(8.0, 3 * bad), {2: rows(2.0), 3: rows(4.0)}, **facts)


def test_a_report_is_one_line_and_survives_the_disk(tmp_path):
    report = a_report(in_float32=False)
    expected = (
        "it begins in the output of blocks.1: -16 to 8, 3 NaN and 0 infinite of 8; in 2 steps "
        "before it went from -8 to 4; in float32 this step is finite"
    )
    assert report.sentence() == expected
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    assert json.loads((tmp_path / "report.json").read_text())["sentence"] == expected
    assert "suspect" in a_report(bad=False).sentence() and a_report(bad=False).first is None
    assert report.table(before=1, after=0).splitlines() == list(map(str, report.readings))


def test_the_plot_has_a_line_for_each_block():
    axes = Figure().add_subplot()
    plot_ranges(a_report(), axes)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["output of blocks.0"] == [2.0, 4.0, 8.0]
    assert lines["output of blocks.1"] == [4.0, 8.0, 16.0]


# ---- in a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    tokenizer = Tokenizer.train(read_documents(["fables:30"]), 300)
    return prepare(["fables:30"], out, tokenizer, val_fraction=0.3, workers=1)


@pytest.fixture
def config(prepared, tmp_path) -> TrainConfig:
    return TrainConfig(
        name="a", runs_dir=str(tmp_path), data=(str(prepared),), steps=24, warmup_steps=4,
        batch_size=4, grad_accum=2, eval_every=0, sample_every=0, checkpoint_every=8,
        log_every=6, lr=3e-3, eval_batches=2, device="cpu",  # where a recorded step is not
    )  # fmt: skip


def quiet(line):
    pass


@contextlib.contextmanager
def cursed(config, *steps, micro=1, split="train"):
    """An embedding that gives an infinite number for one micro-batch of each of these steps."""
    data = TokenData(config.data[0], split)
    seed = {"seed": config.seed} if split == "train" else {}
    batches = Batches(data, config.batch_size, MODEL.max_seq_len, **seed)
    numbers = [(s - 1) * config.grad_accum + micro for s in steps] if split == "train" else steps
    curses = [batches.batch(i)[0] for i in numbers]
    plain = nn.Embedding.forward

    def forward(self, ids):
        hit = any(ids.shape == curse.shape and torch.equal(ids.cpu(), curse) for curse in curses)
        found = plain(self, ids)
        return torch.where(torch.arange(32) == 2, INF, found) if hit else found

    with mock.patch.object(nn.Embedding, "forward", forward):
        yield curses


def tensors(run):
    checkpoint = load_checkpoint(run, optimizer=True)
    return checkpoint.model.state_dict() | checkpoint.optimizer


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped(config, *steps, model=MODEL, **options):
    """What a cursed run says when it stops."""
    with cursed(config, *steps, **options), pytest.raises(ValueError) as error:
        train(model, config, log=quiet)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("step", [1, 2, 9, 13])
def test_a_run_stops_at_the_step_with_the_state_before_it(config, step):
    said = stopped(config, step)
    assert said.startswith(f"the loss is not finite at step {step}: it begins in the output of emb")
    rows = 4 * MODEL.max_seq_len
    assert f"0 NaN and {rows} infinite of {rows * 32}" in said and "--lr 1e-03" in said
    run = Path(config.runs_dir) / "a"
    folder = run / f"nan-{step:06d}"
    assert str(folder) in said and load_checkpoint(folder).step == step - 1
    assert [row["step"] for row in metrics(run)] == list(range(1, step))
    if step > 1:
        whole = replace(config, name="whole", checkpoint_every=step - 1, keep=24)
        healthy = train(MODEL, whole, log=quiet)
        assert_equal(tensors(folder), tensors(healthy / f"step-{step - 1:06d}"))
    batch = safetensors.torch.load_file(folder / "batch.safetensors")
    with cursed(config, step) as (curse,):
        assert torch.equal(batch["inputs.1"], curse)
    assert torch.equal(batch["targets.1"][:, :-1], batch["inputs.1"][:, 1:])
    assert len(batch) == 4 and (folder / "ranges.png").read_bytes()[1:4] == b"PNG"


def test_what_is_saved_is_a_run_that_goes_on_as_if_nothing_had_happened(config):
    stopped(config, 11)
    run = Path(config.runs_dir) / "a"
    name = {"runs_dir": str(run), "name": "nan-000011"}
    again = train(MODEL, replace(config, **name), resume=True, log=quiet)
    whole = train(MODEL, replace(config, name="whole"), log=quiet)
    assert_equal(tensors(again), tensors(whole))


def test_text_prepared_by_the_run_itself_is_found_again(config):
    config = replace(config, data=("fables:30",), val_fraction=0.3)
    with pytest.raises(ValueError, match="not finite at step .*: it begins"):
        train(MODEL, replace(config, lr=1e30, grad_clip=0, weight_decay=0, steps=9), log=quiet)
    run = Path(config.runs_dir) / "a"
    (folder,) = run.glob("nan-*")
    saved = json.loads((folder / "config.json").read_text())["train"]
    assert saved["data"] == [str(run / "data")] and saved["name"] == folder.name


def test_the_steps_before_are_those_that_were(config):
    seen, step_once = {}, debug.train_step

    def watched(run):
        with Watch(run.model) as watch:
            step_once(run)
        seen[run.step] = watch.readings()

    with mock.patch("nanolm.train.train_step", watched):
        stopped(config, 14)
    report = Report.load(Path(config.runs_dir) / "a" / "nan-000014")
    assert sorted(report.before) == [9, 10, 11, 12, 13]  # from the checkpoint at 8
    for step, readings in report.before.items():
        assert readings == seen[step]
    assert list(report.history("blocks.1")) == [9, 10, 11, 12, 13, 14]


def test_without_a_checkpoint_the_beginning_is_one(config):
    stopped(replace(config, checkpoint_every=0), 7)
    report = Report.load(Path(config.runs_dir) / "a" / "nan-000007")
    assert sorted(report.before) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_too_far_back_is_not_repeated_from(config, monkeypatch):
    monkeypatch.setattr(debug, "LONGEST", 3)
    said = stopped(config, 14)
    assert "steps before" not in said and "it begins in" in said


def test_far_steps_are_read_now_and_then(config, monkeypatch):
    monkeypatch.setattr(debug, "READ", 4)
    stopped(replace(config, checkpoint_every=0), 21)
    report = Report.load(Path(config.runs_dir) / "a" / "nan-000021")
    assert sorted(report.before) == [1, 6, 11, 16, 19, 20]


def test_skipping_counts_and_takes_no_step(config):
    said = []
    with cursed(config, 3, 10, 11):
        run = train(MODEL, replace(config, on_nan="skip"), log=said.append)
    rows = {row["step"]: row for row in metrics(run)}
    assert list(rows) == list(range(1, 25))
    assert {step for step, row in rows.items() if "skipped" in row} == {3, 10, 11}
    assert rows[3]["skipped"] == "loss" and "loss" not in rows[3]
    marked = [line.partition("  ")[0] for line in said if line.endswith(("skipped 1", "skipped 2"))]
    assert marked == ["step 06/24", "step 12/24"]
    assert [line[-1] for line in said if "skipped" in line] == ["1", "2"]
    assert all(math.isfinite(row["loss"]) for row in rows.values() if "loss" in row)
    assert "nan" not in said[0] and all(x.isfinite().all() for x in tensors(run).values())
    assert tensors(run)["norm.weight/step"] == 21


def test_a_skipped_step_moves_nothing(config):
    every = replace(config, on_nan="skip", checkpoint_every=1, keep=24, steps=12)
    with cursed(config, 5):
        run = train(MODEL, every, log=quiet)
    one, two, three = (tensors(run / f"step-{s:06d}") for s in (4, 5, 6))
    assert_equal(one, two)
    assert not torch.equal(two["norm.weight"], three["norm.weight"])


def test_too_many_in_a_row_stop_the_run_all_the_same(config):
    config = replace(config, on_nan="skip")
    said = stopped(config, *range(5, 17))  # the log comes at step 16, after twelve of them
    assert said.startswith(
        "the loss is not finite at step 16: it begins in the output of embedding"
    )
    assert tensors(Path(config.runs_dir) / "a" / "nan-000016")["norm.weight/step"] == 4
    with cursed(config, *range(5, 4 + MAX_SKIPPED)):
        assert len(metrics(train(MODEL, replace(config, name="b"), log=quiet))) == 24
    with cursed(config, *range(2, 10), *range(11, 17)):  # fourteen, but not in a row
        assert len(metrics(train(MODEL, replace(config, name="c"), log=quiet))) == 24


def test_on_nan_is_stop_or_skip():
    with pytest.raises(ValueError, match="on_nan must be stop or skip, not 'ignore'"):
        TrainConfig(on_nan="ignore")


def test_a_validation_loss_is_looked_into_too(config):
    said = stopped(replace(config, eval_every=6), 1, split="val")
    assert said.startswith("the validation loss is not finite at step 6: it begins in the output")
    assert load_checkpoint(Path(config.runs_dir) / "a" / "nan-000006").step == 6


def test_compiled_it_is_repeated_plainly(config):
    compiled = mock.Mock(side_effect=lambda f: torch._dynamo.disable(f))
    with mock.patch("torch.compile", compiled):
        said = stopped(replace(config, compile=True), 5)
    assert "it begins in the output of embedding" in said and compiled.call_count == 1


def test_what_plain_steps_do_not_do_is_said(config):
    """A loss that only the compiled function gets wrong: nothing is found, and that is said."""

    def wrong(function):
        return lambda x, y: function(x, y) * NAN

    with mock.patch("torch.compile", wrong), pytest.raises(ValueError) as error:
        train(MODEL, replace(config, compile=True), log=quiet)
    assert "repeated plainly it is finite: suspect what was compiled" in str(error.value)


def test_a_search_that_fails_hides_nothing(config):
    with mock.patch.object(debug, "replay", side_effect=OSError("disk on fire")):
        said = stopped(config, 5)
    assert said.startswith(
        "the loss is not finite at step 5: its cause was not found: disk on fire"
    )
    assert "go on from the beginning" in said


def test_a_lack_of_precision_is_told_from_a_bug(config):
    """A layer that cannot bear bfloat16, in a run under autocast."""
    plain = nn.Linear.forward

    def narrow(self, x):
        found = plain(self, x)
        return found * (NAN if found.dtype == torch.bfloat16 else 1.0)

    with mock.patch.object(nn.Linear, "forward", narrow), pytest.raises(ValueError) as error:
        train(MODEL, replace(config, dtype="bfloat16"), log=quiet)
    assert "the output of blocks.0.attn.q_proj" in str(error.value)
    assert "in float32 this step is finite" in str(error.value)


TEAM = """
    import sys
    import torch
    from nanolm.train import load_run, train
    from test_debug import MODEL, cursed, quiet

    torch.set_num_threads(1)
    config = load_run(sys.argv[1])[1]
    with cursed(config, int(sys.argv[2]), micro=0):
        train(MODEL, config, log=quiet)
"""


def test_of_several_processes_the_first_looks_into_all_micro_batches(config, tmp_path):
    """The curse is on the second process, whose loss alone is infinite at first."""
    plan = tmp_path / "plan"
    plan.mkdir()
    half = replace(config, grad_accum=1, name="team")  # two processes make up the same step
    parts = {"model": asdict(MODEL), "train": asdict(half)}
    (plan / "config.json").write_text(json.dumps(parts))
    script = tmp_path / "team.py"
    script.write_text(textwrap.dedent(TEAM))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*run, str(script), str(plan), "18"], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    said = re.findall("ValueError: (the .*)", done.stderr)
    first = next(line for line in said if "the first process looks into it" not in line)
    assert first.startswith(
        "the loss is not finite at step 9: it begins in the output of embedding"
    )
    assert "in the step before" not in first  # the newest checkpoint is the state before
    folder = tmp_path / "team" / "nan-000009"
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    assert len(safetensors.torch.load_file(folder / "batch.safetensors")) == 4
    assert_equal(tensors(folder), tensors(tmp_path / "team" / "step-000008"))


# ---- the recorded step -------------------------------------------------------------------------


@pytest.mark.parametrize("latch", [True, False])
def test_the_recorded_step_takes_no_bad_step(latch):
    model = Transformer(MODEL)
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-2)
    step = GraphedStep(model, optimizer, dtype=torch.float32, latch=latch)
    moved = []
    for i in range(6):
        names = model.state_dict() | pack_optimizer(model, optimizer)
        before = {name: x.clone() for name, x in names.items() if not name.endswith("/step")}
        step.rows[0].low[5] = NAN if i in (2, 3) else step.rows[0].weight[5]
        loss, norm = step([some_batch()])
        assert (loss + norm).isfinite() == (i not in (2, 3))
        same = [torch.equal(names[name], x) for name, x in before.items()]
        assert all(same) or not any(same)
        moved.append(not all(same))
    assert moved == [True, True, False, False, not latch, not latch]


def test_several_processes_decide_by_what_they_all_know():
    """The loss is one's own, the gradient everybody's."""
    model = Transformer(MODEL)
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-2)
    step = GraphedStep(model, optimizer, dtype=torch.float32, reduce=lambda grads: None)
    for rows in step.rows:
        rows.hyper.copy_(torch.tensor([1e-2, 0.1, 0.05]))
        rows.grad.fill_(1.0)
    before = model.norm.weight.clone()
    step.update(torch.tensor(NAN))
    assert not torch.equal(model.norm.weight, before)


def test_a_recording_leaves_the_latch_as_it_was():
    model = Transformer(MODEL)
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-2)
    step = GraphedStep(model, optimizer, dtype=torch.float32, latch=True)
    graph = mock.Mock()

    def record(function):
        step.good.fill_(False)  # as a bad step in the warm-up of a recording would
        return graph, function()

    with mock.patch("nanolm.step.record", record):
        step.take([some_batch()])
        step.prepare()
        step.replay()
    assert step.good and graph.replay.call_count == 1


def recorded(run):
    """Stands in for `speed_up`: the step of a card, on a CPU, where it is not recorded."""
    latch = run.config.on_nan == "stop"
    limits = {"grad_accum": run.config.grad_accum, "latch": latch, "dtype": torch.float32}
    run.graphed = GraphedStep(run.model, run.optimizer, **limits)
    run.loss_of = run.graphed.loss


@contextlib.contextmanager
def poisoned_passes(*steps):
    """The hand-written passes give an infinite gradient in some steps' last micro-batch."""
    plain, calls = Passes.__call__, []

    def call(self, *given, **options):
        calls.append(0)
        loss = plain(self, *given, **options)
        if len(calls) % 2 == 0 and len(calls) // 2 in steps:
            self.place_of["norm.weight"][1] = INF
        return loss

    with mock.patch.object(Passes, "__call__", call), mock.patch("nanolm.train.speed_up", recorded):
        yield


def test_between_two_log_lines_a_recorded_run_stands_still(config):
    """The log comes at step 12, the bad step is 9: its state is that of the checkpoint at 8."""
    config = replace(config, log_every=12)
    with (
        poisoned_passes(9),
        pytest.raises(ValueError, match="gradient is not finite at step 9: ") as error,
    ):
        train(MODEL, config, log=quiet)
    assert "repeated plainly it is finite" in str(error.value)
    run = Path(config.runs_dir) / "a"
    assert_equal(tensors(run / "nan-000009"), tensors(run / "step-000008"))
    assert tensors(run / "nan-000009")["norm.weight/step"] == 8
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))


def test_what_only_the_passes_do_is_laid_at_their_door(config):
    every = range(9, 99)
    with poisoned_passes(*every), pytest.raises(ValueError, match="at step 9: ") as error:
        train(MODEL, config, log=quiet)
    said = "it begins in the gradient of norm.weight: .*, by the passes of the recorded step"
    assert re.search(said, str(error.value))


def test_a_recorded_run_skips_too(config):
    with poisoned_passes(9, 10):
        run = train(MODEL, replace(config, on_nan="skip", checkpoint_every=1, keep=24), log=quiet)
    rows = [row["step"] for row in metrics(run) if "skipped" in row]
    assert rows == [9, 10]
    at = {step: tensors(run / f"step-{step:06d}") for step in (8, 10, 11)}
    for name, x in at[8].items():
        assert name.endswith("/step") or torch.equal(x, at[10][name])
    assert not torch.equal(at[11]["norm.weight"], at[10]["norm.weight"])


def test_the_measured_cost_is_under_one_percent():
    results = Path(__file__).parent.parent / "book/results/nan-h200.json"
    rows = json.loads(results.read_text())["cost"]
    assert len(rows) == 2
    assert all(row["guarded_ms"] < 1.01 * row["bare_ms"] for row in rows)


@on_gpu
def test_on_a_card_nothing_moves_until_the_log_comes(config):
    """Weights of 1e30 overflow in step 2; the log comes at step 12, and step 1 is still there."""
    wild = replace(config, lr=1e30, warmup_steps=0, grad_clip=0, weight_decay=0, log_every=12)
    wild = replace(wild, device="cuda")
    wild = replace(wild, checkpoint_every=0)
    with pytest.raises(ValueError, match="not finite at step 2: it begins in"):
        train(MODEL, wild, log=quiet)
    with contextlib.suppress(ValueError):
        train(MODEL, replace(wild, name="b", checkpoint_every=1), log=quiet)
    runs = Path(config.runs_dir)
    assert_equal(tensors(runs / "a/nan-000002"), tensors(runs / "b/step-000001"))
