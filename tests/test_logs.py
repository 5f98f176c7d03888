"""The diary, and those who are told the same."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from seeded import one_seed  # noqa: F401

from nanolm.data import prepare, read_documents
from nanolm.logs import PEAKS, Diary, metrics, mfu, peak_flops, span
from nanolm.model import ModelConfig, flops_per_token
from nanolm.tokenizer import Tokenizer
from nanolm.train import TrainConfig, train

loop = importlib.import_module("nanolm.train")
MODEL = ModelConfig(
    vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_seq_len=16
)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    tokenizer = Tokenizer.train(read_documents(["fables:8"]), 300)
    text = prepare(["fables:8"], tmp_path / "text", tokenizer, val_fraction=0.3, workers=1)
    return TrainConfig(
        name="a", runs_dir=str(tmp_path), data=(str(text),), steps=12, warmup_steps=2,
        batch_size=2, eval_every=6, eval_batches=1, sample_every=0, checkpoint_every=6, log_every=3,
    )  # fmt: skip


def quiet(line: str) -> None:
    pass


@pytest.fixture
def board(monkeypatch):
    """A stand-in for TensorBoard: what each writer was made with, and was told."""
    made: list = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], 0
            made.append(self)

        def add_scalar(self, name, value, step):
            self.rows.append((step, name, value))

        def close(self):
            self.closed += 1

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for Weights & Biases."""
    made: list = []

    class Record:
        def __init__(self, **options):
            self.options, self.rows, self.axes, self.finished = options, [], [], 0
            made.append(self)

        def define_metric(self, name, step_metric):
            self.axes.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.finished += 1

    module = ModuleType("wandb")
    monkeypatch.setattr(module, "init", lambda **options: Record(**options), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


def scalars(run):
    """What a board should have been told, by the diary."""
    rows = metrics(run)
    return [(r["step"], k, v) for r in rows for k, v in r.items() if k != "step" and v is not None]


def test_tensorboard_is_told_the_diary_and_resumed_where_the_run_is(config, board):
    run = train(MODEL, replace(config, tensorboard=True), log=quiet)
    assert board[0].rows == scalars(run) and board[0].closed == 1
    assert board[0].folder == str(run / "tensorboard") and board[0].purge_step == 1
    train(MODEL, replace(config, tensorboard=True, steps=18), resume=True, log=quiet)
    assert board[1].purge_step == 13
    assert board[0].rows + board[1].rows == scalars(run)


def test_wandb_is_told_the_diary_and_goes_on_in_the_same_record(config, wandb):
    run = train(MODEL, replace(config, wandb="fables"), log=quiet)
    train(MODEL, replace(config, wandb="fables", steps=18), resume=True, log=quiet)
    one, two = wandb
    assert one.options["project"] == "fables" and one.options["config"]["n_layer"] == 1
    assert one.options["id"] == two.options["id"] and one.options["resume"] == "allow"
    assert one.axes == [("*", "step")] and one.finished == two.finished == 1
    known = [{k: v for k, v in row.items() if v is not None} for row in metrics(run)]
    assert one.rows + two.rows == known


def test_nobody_is_told_who_was_not_asked_for(config, board, wandb):
    train(MODEL, config, log=quiet)
    assert not board and not wandb


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"wandb": "x"}])
def test_what_is_not_installed_is_said_before_anything_is_written(config, option, monkeypatch):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'nanolm\[") as error:
        train(MODEL, replace(config, **option), log=quiet)
    assert "\n" not in str(error.value)
    train(MODEL, config, log=quiet)  # the name is still free


def test_a_dashboard_that_fails_costs_no_run(config, board, monkeypatch):
    said: list[str] = []
    train(MODEL, replace(config, tensorboard=True, name="b"), log=quiet)
    writer = sys.modules["torch.utils.tensorboard"].SummaryWriter

    def lost(self, name, value, step):
        if step == 5:
            raise OSError("connection lost")

    monkeypatch.setattr(writer, "add_scalar", lost)
    run = train(MODEL, replace(config, tensorboard=True), log=said.append)
    assert [line for line in said if "TensorBoard" in line] == [
        "TensorBoard has failed, training goes on without it: connection lost"
    ]
    assert [row["step"] for row in metrics(run) if "loss" in row] == list(range(1, 13))


def test_the_real_tensorboard_reads_it(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(MODEL, replace(config, tensorboard=True), log=quiet)
    train(MODEL, replace(config, tensorboard=True, steps=15), resume=True, log=quiet)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 4)) for event in events.Scalars("loss")]
    assert found == [(r["step"], round(r["loss"], 4)) for r in metrics(run) if "loss" in r]


def test_values_that_are_none_stay_in_the_diary_only(tmp_path, board):
    diary = Diary(tmp_path, tensorboard=True)
    diary.write({"step": 1, "val_loss": 2.0, "floor": None})
    assert board[0].rows == [(1, "val_loss", 2.0)]
    assert metrics(tmp_path) == [{"step": 1, "val_loss": 2.0, "floor": None}]


def test_a_diary_with_nonsense_in_it(tmp_path):
    lines = ['{"step": 1}', "[" * 100_000, "7", '{"step": "2"}', '{"step": 3}', '{"step']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3]


# speed


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX A6000", 154.8), ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None), ("", None),
        ("NVIDIA RTX 6000 Ada Generation", None), ("AMD Instinct MI300X", None),
    ],
)  # fmt: skip
def test_known_cards_and_others(card, peak):
    assert peak_flops(card) == (peak and peak * 1e12)


def test_each_known_card_is_found_by_its_own_name():
    for name, peak in PEAKS.items():
        assert peak_flops(f"NVIDIA {name}") == peak * 1e12


def test_mfu_is_in_the_log_where_the_card_is_known(config, monkeypatch):
    shape = replace(MODEL, max_seq_len=16)
    assert mfu(2e6, flops_per_token(shape, 16), None) is None
    assert mfu(2e6, 100, 1e9) == 0.2
    lines: list[str] = []
    monkeypatch.setattr(loop, "mfu", lambda rate, work, peak: 0.415)
    train(MODEL, config, log=lines.append)
    assert all("  mfu 42%  left 0:00:" in line for line in lines if line.startswith("step"))


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (360000, "100:00:00")]
)
def test_spans_of_time(seconds, text):
    assert span(seconds) == text and span(-1) == "0:00:00"


def test_the_time_left_counts_what_the_steps_took_so_far(config, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    step = loop.train_step

    def slow(run):
        run.clock = 1000.0 if run.step == 0 else run.clock
        now[0] += 50 if run.step == 0 else 10  # the first one compiles
        step(run)

    monkeypatch.setattr(loop, "train_step", slow)
    lines: list[str] = []
    train(MODEL, replace(config, eval_every=0), log=lines.append)
    left = [line.partition("left ")[2][:7] for line in lines]
    assert left == ["0:03:30", "0:01:00", "0:00:30", "0:00:00"]
