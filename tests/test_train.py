"""The training loop: nothing is lost, nothing disturbs it, and bad input costs one line."""

import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from place import on_gpu

from nanolm.data import Batches, TokenData, prepare, read_documents
from nanolm.model import ModelConfig, Transformer
from nanolm.tokenizer import Tokenizer
from nanolm.train import TrainConfig, load_checkpoint, load_run, metrics, step_folders, train

loop = importlib.import_module("nanolm.train")  # `nanolm.train` itself is the function
store = importlib.import_module("nanolm.checkpoint")
MODEL = ModelConfig(
    vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=48, max_seq_len=32
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that a second thread only gets in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Fables as tokens, 300 ids: few enough windows for several epochs in 24 steps."""
    out = tmp_path_factory.mktemp("prepared")
    tokenizer = Tokenizer.train(read_documents(["fables:16"]), 300)
    return prepare(["fables:16"], out, tokenizer, val_fraction=0.3, workers=1)


def options(prepared: Path, runs: Path) -> TrainConfig:
    return TrainConfig(
        name="a", runs_dir=str(runs), data=(str(prepared),), steps=24, warmup_steps=4,
        batch_size=4, grad_accum=2, eval_every=10, eval_batches=2, sample_every=0,
        checkpoint_every=8, log_every=3, lr=3e-3,
    )  # fmt: skip


@pytest.fixture
def config(prepared, tmp_path) -> TrainConfig:
    return options(prepared, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    return train(MODEL, replace(options(prepared, runs), name="whole"), log=quiet)


@pytest.fixture
def whole(uninterrupted, tmp_path) -> Path:
    """A copy of the uninterrupted run that the others are held against."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "whole"))


class Crash(Exception):
    """Stands for a power cut: nothing after it runs."""


def crash_at(step: int):
    def log(line: str) -> None:
        if line.startswith(f"step {step:02d}/"):
            raise Crash

    return log


def quiet(line: str) -> None:
    pass


def curve(run: Path) -> list[dict]:
    """The metrics without what a clock says."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(run, optimizer=True)
    return checkpoint.model.state_dict() | checkpoint.optimizer


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    states = [load_checkpoint(run).state for run in (one, other)]
    assert states[0] == states[1]


# resume


@pytest.mark.parametrize("step", [3, 9, 18, 21])
def test_a_run_cut_off_and_resumed_is_the_uninterrupted_run(config, whole, step):
    with pytest.raises(Crash):
        train(MODEL, config, log=crash_at(step))
    torch.manual_seed(99)  # a new process has another random state
    assert_same_run(train(MODEL, config, resume=True, log=quiet), whole)


def test_compiled_too(config):
    plan = replace(config, compile=True, steps=8, warmup_steps=2, checkpoint_every=3, eval_every=0)
    run = train(MODEL, replace(plan, name="through"), log=quiet)
    with pytest.raises(Crash):
        train(MODEL, replace(plan, log_every=1), log=lambda line: crash_at(5)(f"step 0{line[5:]}"))
    assert_same_run(train(MODEL, plan, resume=True, log=quiet), run)


def test_the_test_above_crosses_epochs(config, prepared):
    batches = Batches(TokenData(prepared, "train"), config.batch_size, 32, seed=config.seed)
    used = config.steps * config.grad_accum * config.batch_size
    assert used > batches.windows


def test_resuming_what_is_finished_does_nothing(config, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    train(MODEL, replace(config, name="whole"), resume=True, log=quiet)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_are_done(config, whole):
    before = (whole / "config.json").read_bytes()
    with pytest.raises(ValueError, match="has done 24 steps: give --steps above 24"):
        train(MODEL, replace(config, name="whole", steps=20), resume=True, log=quiet)
    assert (whole / "config.json").read_bytes() == before
    said: list[str] = []
    train(MODEL, replace(config, name="whole"), resume=True, log=said.append)
    assert len(said) == 1 and "already finished" in said[0]


def test_a_damaged_diary_does_not_stop_a_run(config, whole):
    expected = curve(whole)
    with open(whole / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"loss": 1}\n\xff\xfe}\n{"step": "x"}\n{"step": 25, "lo}')
    assert curve(whole) == expected
    train(MODEL, replace(config, name="whole", steps=26), resume=True, log=quiet)
    assert [row["step"] for row in metrics(whole) if "loss" in row] == list(range(1, 27))


@pytest.mark.parametrize("extra", [0, 1, 2, 15, 30, 31])
def test_a_short_validation_text_is_no_reason_to_refuse(config, prepared, tmp_path, extra):
    class Part:
        def __init__(self, path, split):
            self.whole = TokenData(path, split)
            self.meta, self.size = self.whole.meta, 64 + extra if split == "val" else None

        def __len__(self):
            return self.size or len(self.whole)

        def __getitem__(self, place):
            return self.whole[place]

    make = {"resume": False, "log": quiet, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TokenData", Part)
        run = loop.open_run(MODEL, config, **make)
        loop.validate(run)
    assert run.val_batches.batch_size == run.val_batches.windows == 1


def test_a_longer_run_may_be_asked_for_on_resume(config, whole):
    train(MODEL, replace(config, name="whole", steps=30), resume=True, log=quiet)
    assert load_checkpoint(whole).step == 30
    assert load_run(whole)[1].steps == 30


def test_order_of_the_data_does_not_depend_on_where_a_run_was_cut(config, monkeypatch):
    seen = []
    batch = Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, i: (seen.append(i), batch(self, i))[1])
    quick = replace(config, eval_every=0)
    with pytest.raises(Crash):
        train(MODEL, quick, log=crash_at(12))
    assert seen == list(range(24))
    seen.clear()
    train(MODEL, quick, resume=True, log=quiet)
    assert seen == list(range(16, 48))


def test_prepared_data_is_not_made_again_on_resume(config, tmp_path, monkeypatch):
    own = replace(config, data=("fables:16",), val_fraction=0.3)
    with pytest.raises(Crash):
        train(MODEL, own, log=crash_at(12))
    monkeypatch.setattr(loop, "prepare", None)
    train(MODEL, own, resume=True, log=quiet)


# gradients


def gradients(config, rows, count, prepared) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    batches = Batches(TokenData(prepared, "train"), 8, 32)
    ids, targets = batches.batch(0)
    micro = zip(ids.split(rows), targets.split(rows), strict=True)
    loop.accumulate(model.loss, micro, count)
    return [weight.grad for weight in model.parameters()]


def test_accumulated_gradient_is_the_gradient_of_the_big_batch(config, prepared):
    whole = gradients(config, 8, 1, prepared)
    for rows in (4, 2, 1):
        for a, b in zip(whole, gradients(config, rows, 8 // rows, prepared), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_same_global_batch_same_curve(config):
    runs = [
        train(
            MODEL, replace(config, name=f"{b}x{a}", batch_size=b, grad_accum=a, steps=8), log=quiet
        )
        for b, a in ((8, 1), (4, 2), (2, 4))
    ]
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in runs]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-4, atol=1e-4)


def test_clip_of_zero_means_no_limit(config, monkeypatch):
    limits = []
    clip = loop.clip_grad_norm
    monkeypatch.setattr(
        loop, "clip_grad_norm", lambda p, limit: (limits.append(limit), clip(p, limit))[1]
    )
    train(MODEL, replace(config, grad_clip=0, steps=5), log=quiet)
    assert set(limits) == {float("inf")}


# learning and evaluation


def test_it_learns(prepared, config):
    wider = replace(MODEL, d_model=64)
    run = train(wider, replace(config, steps=100, lr=1e-2, batch_size=16, grad_accum=1), log=quiet)
    tokens = torch.from_numpy(TokenData(prepared, "train")[:].astype("int64"))
    share = torch.bincount(tokens) / len(tokens)
    unigram = torch.special.entr(share).sum().item()
    last = [row["loss"] for row in metrics(run) if "loss" in row][-10:]
    assert sum(last) / 10 < unigram - 0.5


def test_evaluation_does_not_disturb_training(config, whole):
    often = replace(config, name="often", eval_every=1, sample_every=5)
    run = train(MODEL, often, log=quiet)
    a, b = tensors(run), tensors(whole)
    assert all(torch.equal(a[name], b[name]) for name in a)


@on_gpu
def test_samples_by_the_decoder_do_not_disturb_training(config):
    """On a GPU it records and launches beside the step's own recording."""
    exact, made = replace(config, deterministic=True), []
    for name, every in (("with", 8), ("without", 0)):
        made.append(tensors(train(MODEL, replace(exact, name=name, sample_every=every), log=quiet)))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[1])


def test_a_sample_by_the_decoder_changes_nothing(config):
    run = loop.open_run(MODEL, config, resume=False, log=quiet, progress=False)
    plain, before = loop.show_sample(run), [p.clone() for p in run.model.parameters()]
    run.graphed, state = object(), torch.get_rng_state()
    boxes = [loop.show_sample(run) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, run.model.parameters()))
    assert boxes[0] == boxes[1] and boxes[0].startswith("┌─ step 0") and plain[:10] == boxes[0][:10]


def test_evaluation_is_the_same_every_time_and_whatever_the_seed(config, prepared):
    model = Transformer(MODEL)
    batches = Batches(TokenData(prepared, "val"), 4, 32)
    first = loop.evaluate(model, batches, 3)
    torch.manual_seed(5)
    assert loop.evaluate(model, batches, 3) == first
    make = {"resume": False, "log": quiet, "progress": False}
    seeds = [replace(config, name=f"seed{seed}", seed=seed) for seed in (1, 2)]
    one, other = (loop.open_run(MODEL, config, **make) for config in seeds)
    assert torch.equal(one.val_batches.batch(0)[0], other.val_batches.batch(0)[0])
    assert not torch.equal(one.batches.batch(0)[0], other.batches.batch(0)[0])


def test_log_lines_and_boxed_samples(config):
    lines: list[str] = []
    prompt = replace(config, sample_every=12, sample_prompt="Fox")
    train(MODEL, prompt, log=lines.append)
    steps = [line for line in lines if line.startswith("step ")]
    pattern = (
        r"step \d\d/24  loss \d\.\d{3}  lr \d\.\de-\d  tok/s \d+  left 0:00:\d\d"
        r"(  val \d\.\d{3}  floor \d\.\d{3})?"
    )
    assert all(re.fullmatch(pattern, line) for line in steps)
    assert [line[5:7] for line in steps if "val" in line] == ["08", "10", "16", "20", "24"]
    boxes = [line for line in lines if line.startswith("┌─ step")]
    assert [box[:10] for box in boxes] == ["┌─ step 12", "┌─ step 24"]
    assert all("│ Fox" in box for box in boxes)


def test_the_garbage_collector_is_spared_what_was_there_before(config):
    counts = []
    train(MODEL, config, log=lambda line: counts.append(gc.get_freeze_count()))
    assert max(counts) > 10_000 and gc.get_freeze_count() == 0
    with pytest.raises(KeyError), loop.frozen_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_metrics_have_a_line_for_each_step(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert [row["step"] for row in rows if "val_loss" in row] == [8, 10, 16, 20, 24]
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} < set(rows[0])
    assert rows[-1]["floor"] > 0
    assert metrics(whole / "nowhere") == []


def test_compiled_training_saves_the_same_names(config, whole):
    short = replace(config, name="compiled", compile=True, steps=5, eval_every=0, grad_accum=1)
    names = set(load_checkpoint(train(MODEL, short, log=quiet)).model.state_dict())
    assert names == set(load_checkpoint(whole).model.state_dict())


def test_bfloat16_can_be_asked_for(config):
    run = train(MODEL, replace(config, dtype="bfloat16", steps=6), log=quiet)
    weights = load_checkpoint(run).model.state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


# checkpoints


def test_newest_and_best_are_kept(config, tmp_path):
    model = Transformer(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, val in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None), (1_000_000, 2.2)]:
        store.save_checkpoint(tmp_path, model, optimizer, step=step, keep=2, val_loss=val)
    names = [folder.name for folder in step_folders(tmp_path)]
    assert names == ["step-000002", "step-000005", "step-1000000"]
    assert not list(tmp_path.glob(".step-*"))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "flip":
        content[len(content) // 2] ^= 1
    else:
        path.unlink()
        return
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damaged_checkpoint_falls_back_to_the_one_before(config, whole, name, how):
    damage(whole / "step-000024" / name, how)
    said: list[str] = []
    assert load_checkpoint(whole, optimizer=True, log=said.append).step == 16
    assert len(said) == 1 and "step-000024" in said[0] and "before it" in said[0]
    with pytest.raises((ValueError, OSError), match="step-000024") as error:
        load_checkpoint(whole / "step-000024", optimizer=True)
    assert "\n" not in str(error.value)


def test_training_goes_on_from_the_one_before(config, whole):
    expected = curve(whole)
    damage(whole / "step-000024" / "model.safetensors", "flip")
    train(MODEL, replace(config, name="whole"), resume=True, log=quiet)
    assert curve(whole) == expected
    assert load_checkpoint(whole).step == 24


def test_no_good_checkpoint_left(whole):
    for folder in step_folders(whole):
        damage(folder / "state.json", "cut")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(whole, log=quiet)


def test_nothing_there(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run at"):
        train(MODEL, config, resume=True, log=quiet)


def test_killed_before_the_first_checkpoint_starts_again(config, whole):
    with pytest.raises(Crash):
        train(MODEL, config, log=crash_at(6))
    said: list[str] = []
    assert_same_run(train(MODEL, config, resume=True, log=said.append), whole)
    assert "after step 0" in said[0]


def reseal(folder: Path, **changes) -> None:
    """Change state.json and give it a fitting checksum, as a stranger could."""
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"]
    state |= changes
    state["checksum"] = store.fingerprint(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_a_file_that_is_no_safetensors(whole):
    folder = step_folders(whole)[-1]
    bad = store.write_file(folder / "model.safetensors", b"not tensors at all" * 10_000)
    good = json.loads((folder / "state.json").read_text())["sha256"]["optimizer.safetensors"]
    reseal(folder, sha256={"model.safetensors": bad, "optimizer.safetensors": good})
    with pytest.raises(ValueError, match="holds no tensors"):
        load_checkpoint(folder)


def test_full_disk_leaves_the_last_checkpoint_whole(config, monkeypatch):
    write = store.write_file

    def no_space(path: Path, content: bytes) -> str:
        if ".step-000016" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(content[:100])
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(store, "write_file", no_space)
    match = r"stopped at step (16|17|18|19): .*No space left.*\(step 8\).*--resume"
    with pytest.raises(OSError, match=match) as error:
        train(MODEL, config, log=quiet)
    assert "\n" not in str(error.value)
    run = Path(config.runs_dir) / config.name
    assert not list(run.glob(".step-*"))
    assert load_checkpoint(run).step == 8
    monkeypatch.setattr(store, "write_file", write)
    train(MODEL, config, resume=True, log=quiet)
    assert load_checkpoint(run).step == 24


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(config, tmp_path):
    path = tmp_path / "full"
    path.with_name("full.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        store.write_file(path, b"x")
    assert not path.exists()


def test_an_interrupted_write_of_the_same_step_keeps_the_old_one(whole, monkeypatch):
    model = load_checkpoint(whole).model
    optimizer = torch.optim.AdamW(model.parameters())
    move = os.replace

    def broken(source, target):
        if Path(source).name == ".step-000024":
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output"):
        store.save_checkpoint(whole, model, optimizer, step=24)
    monkeypatch.undo()
    assert load_checkpoint(whole, optimizer=True, log=pytest.fail).step == 24
    store.save_checkpoint(whole, model, optimizer, step=24, fresh=True)
    assert load_checkpoint(whole).state["fresh"] and not list(whole.glob(".step-*"))


def test_what_was_never_evaluated_is_not_the_best(config, tmp_path):
    model = Transformer(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, val in [(1, None), (2, float("nan")), (3, None), (4, None)]:
        store.save_checkpoint(tmp_path / "b", model, optimizer, step=step, keep=2, val_loss=val)
    assert [folder.name[-1] for folder in step_folders(tmp_path / "b")] == ["3", "4"]
    run = train(MODEL, replace(config, eval_every=0, keep=1), log=quiet)
    assert [folder.name for folder in step_folders(run)] == ["step-000024"]


def test_a_checkpoint_has_the_validation_loss_of_its_own_step(whole):
    found = {row["step"]: row["val_loss"] for row in metrics(whole) if "val_loss" in row}
    for folder in step_folders(whole):
        checkpoint = load_checkpoint(folder)
        assert checkpoint.state["val_loss"] == found[checkpoint.step]


def test_sampling_needs_no_optimizer_and_works_from_within(whole, monkeypatch):
    folder = step_folders(whole)[-1]
    (folder / "optimizer.safetensors").unlink()
    monkeypatch.chdir(folder)
    assert load_checkpoint(".", log=pytest.fail).optimizer == {}
    assert load_checkpoint("..", log=pytest.fail).step == 24


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_fault_that_all_checkpoints_share_is_reported_once(whole, name):
    (whole / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        load_checkpoint(whole, log=pytest.fail)


def test_output_that_fails_costs_no_work(config):
    def closed(line: str) -> None:
        if line.startswith("step 08/"):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError, match="Broken pipe$"):
        train(MODEL, config, log=closed)
    assert load_checkpoint(Path(config.runs_dir) / config.name).step == 8


def test_room_is_only_asked_for_where_it_is_short(config):
    def unlucky(line: str) -> None:
        if line.startswith("step 03/"):
            raise OSError(5, "Input/output error")

    name = replace(config, name="a b")
    with pytest.raises(OSError, match="stopped at step 3: .*; go on from the beginning") as error:
        train(MODEL, name, log=unlucky)
    assert "make room" not in str(error.value) and "--name 'a b'" in str(error.value)


@pytest.mark.parametrize("eval_every", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config, eval_every):
    wild = replace(config, warmup_steps=0, grad_clip=0, checkpoint_every=0, eval_every=eval_every)
    with pytest.raises(ValueError, match="not finite at step .* beginning with a lower --lr") as e:
        train(MODEL, replace(wild, lr=1e30, weight_decay=0), log=quiet)
    assert "\n" not in str(e.value)
    run = Path(config.runs_dir) / config.name
    assert not step_folders(run)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert "Infinity" not in (run / "metrics.jsonl").read_text()


def test_divergence_names_the_checkpoint_to_go_on_from(config, whole):
    wild = replace(config, name="whole", steps=40, lr=1e30, grad_clip=0, weight_decay=0)
    with pytest.raises(ValueError, match=r"last checkpoint \(step 24\) with a lower --lr: nanolm"):
        train(MODEL, wild, resume=True, log=quiet)
    assert load_checkpoint(whole).step == 24
    train(MODEL, replace(config, name="whole", steps=26), resume=True, log=quiet)
    assert load_checkpoint(whole).step == 26


# signals and kills, in processes of their own

SCRIPT = """
import importlib, os, signal, sys

from nanolm.model import ModelConfig
from nanolm.train import load_run, train
run, resume, die_at = sys.argv[1], sys.argv[2] == "resume", sys.argv[3]
model_config, config = load_run(run + "-plan")
loop, store = map(importlib.import_module, ("nanolm.train", "nanolm.checkpoint"))
write = store.write_file
def write_file(path, content):
    if die_at in str(path):
        path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)
if die_at != "-":
    loop.write_file = store.write_file = write_file
train(model_config, config, resume=resume, log=lambda line: print(line, flush=True))
"""


def start(run: Path, *, resume: bool, die_at: str = "-") -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(run), "resume" if resume else "new", die_at]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def plan(config: TrainConfig) -> Path:
    """Where the run will be; its configs lie beside it for the script to read."""
    run = Path(config.runs_dir) / config.name
    beside = run.with_name(run.name + "-plan")
    beside.mkdir()
    both = {"model": vars(MODEL), "train": vars(config)}
    (beside / "config.json").write_text(json.dumps(both))
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(config, whole, number):
    run = plan(replace(config, log_every=1))
    process = start(run, resume=False)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 05/"):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""
    assert f"go on with: nanolm train --name a --runs-dir {config.runs_dir} --resume" in rest
    assert 5 <= load_checkpoint(run).step < 24
    assert_same_run(train(MODEL, replace(config, log_every=1), resume=True, log=quiet), whole)


def test_killed_again_and_again_also_while_writing(config, whole):
    run = plan(config)
    places = [".step-000008/model", ".step-000016/state", "step-000024/optimizer", "config.json"]
    for place in places:
        process = start(run, resume=(run / "config.json").exists(), die_at=place)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        if step_folders(run):
            load_checkpoint(run, optimizer=True, log=pytest.fail)
    assert list(run.glob(".step-*"))  # half a checkpoint is still there, and ignored
    assert_same_run(train(MODEL, config, resume=True, log=quiet), whole)
    assert not list(run.glob(".step-*"))


def test_a_signal_in_the_last_step_leaves_nothing_to_go_on_with(config, monkeypatch):
    said: list[str] = []
    step = loop.train_step

    def last(run):
        step(run)
        if run.step == 24:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", last)
    train(MODEL, config, log=said.append)
    assert said and not any("go on" in line for line in said)


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), loop.caught_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_at_once_is_an_echo_and_a_later_one_is_not(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), loop.caught_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM] * 2
        now[0] += 2
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif(not shutil.which("timeout"), reason="needs timeout")
def test_a_run_under_timeout_is_saved(config):
    run = plan(replace(config, steps=100_000, checkpoint_every=0, eval_every=0))
    command = ["timeout", "20", sys.executable, "-c", SCRIPT, str(run), "new", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert "stopped and saved after step" in done.stdout, done.stderr


def test_training_in_a_thread(config):
    runs: list[Path] = []
    short = replace(config, steps=5)
    worker = threading.Thread(target=lambda: runs.append(train(MODEL, short, log=quiet)))
    worker.start()
    worker.join()
    assert load_checkpoint(runs[0]).step == 5


def test_progress_bar_lives_with_the_log(config, capfd, monkeypatch):
    real = loop.tqdm
    monkeypatch.setattr(
        loop, "tqdm", lambda **kw: real(**{**kw, "disable": False, "mininterval": 0})
    )
    train(MODEL, replace(config, steps=6), progress=True)
    out, err = capfd.readouterr()
    assert out.splitlines()[-1].startswith("step 6/6")
    assert "6/6" in err and "tok/s" in err and "loss" in err


# bad input: one line, nothing overwritten


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"batch_size": 0}, {"grad_accum": 0}, {"lr": -1.0}, {"lr": float("nan")},
        {"val_fraction": 2.0}, {"warmup_steps": 24}, {"name": ""}, {"name": "a/b"}, {"name": ".."},
        {"lr": float("inf")}, {"weight_decay": float("inf")}, {"beta1": 1.0}, {"beta2": 1},
        {"seed": 2**63}, {"batch_size": 4.5}, {"steps": True}, {"lr": "fast"}, {"compile": 1},
        {"name": 3}, {"data": (3,)}, {"dtype": "float16"},
        {"data": ()}, {"keep": 0}, {"log_every": 0}, {"beta2": 1.5},
    ],
)  # fmt: skip
def test_config_refuses_nonsense(config, bad):
    with pytest.raises(ValueError, match=next(iter(bad))) as error:
        replace(config, **bad)
    assert "\n" not in str(error.value)


def test_presets():
    assert TrainConfig.preset("default") == TrainConfig()
    assert TrainConfig.preset("pocket").steps < 20_000
    assert TrainConfig(data="text.txt").data == ("text.txt",)
    with pytest.raises(ValueError, match="pocket"):
        TrainConfig.preset("huge")


def test_every_field_has_help_with_a_unit():
    for option in TrainConfig.__dataclass_fields__.values():
        assert option.metadata["help"]


def test_existing_run_is_refused(config, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        train(MODEL, replace(config, name="whole"), log=quiet)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name, value",
    [("n_layer", 3), ("d_model", 64), ("seed", 1), ("batch_size", 2), ("grad_accum", 1)],
)
def test_resume_with_another_config_names_the_field(config, whole, name, value):
    before = (whole / "config.json").read_bytes()
    model, options = MODEL, replace(config, name="whole")
    if hasattr(MODEL, name):
        model = replace(MODEL, **{name: value})
    else:
        options = replace(options, **{name: value})
    with pytest.raises(ValueError, match=rf"cannot resume .*: its {name} is .*, not {value}"):
        train(model, options, resume=True, log=quiet)
    assert (whole / "config.json").read_bytes() == before


def test_checkpoint_of_another_shape(config, whole):
    path = whole / "config.json"
    both = json.loads(path.read_text())
    both["model"]["d_ff"] = 64
    path.write_text(json.dumps(both))
    with pytest.raises(ValueError, match=r"gate_proj.weight is \(48, 32\), .* makes it \(64, 32\)"):
        load_checkpoint(step_folders(whole)[-1])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"depth": 3}, "train": {}}'])
def test_broken_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the config of a run") as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_changed_text_is_refused(config, whole, prepared, tmp_path):
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    other = prepare(["fables:16:1"], tmp_path / "other", tokenizer, val_fraction=0.3, workers=1)
    path = whole / "config.json"
    path.write_text(path.read_text().replace(str(prepared), str(other)))
    moved = replace(config, name="whole", data=(str(other),))
    with pytest.raises(ValueError, match="training text has changed"):
        train(MODEL, moved, resume=True, log=quiet)


def test_text_of_the_same_size_but_other_words_is_refused(config, whole, prepared, tmp_path):
    """Its sums are others, though every count is the same."""
    other = Path(shutil.copytree(prepared, tmp_path / "other"))
    content = bytearray((other / "train-00000.bin").read_bytes())
    content[:2], content[2:4] = content[2:4], content[:2]
    assert content[:2] != content[2:4]
    (other / "train-00000.bin").write_bytes(content)
    about = json.loads((other / "train-00000.json").read_text())
    about["sha256"] = hashlib.sha256(content).hexdigest()
    (other / "train-00000.json").write_text(json.dumps(about))
    path = whole / "config.json"
    path.write_text(path.read_text().replace(str(prepared), str(other)))
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    moved = replace(config, name="whole", data=(str(other),))
    with pytest.raises(ValueError, match="training text has changed"):
        train(MODEL, moved, resume=True, log=quiet)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_two_trainings_into_one_folder(config, whole):
    """The second one is kept out while the first one is at work, and changes nothing."""
    refused: list[str] = []

    def busy(line: str) -> None:
        if line.startswith("step 27/"):
            with pytest.raises(ValueError, match="another process is training") as error:
                train(MODEL, more, resume=True, log=quiet)
            refused.append(str(error.value))

    more = replace(config, name="whole", steps=30)
    train(MODEL, more, resume=True, log=busy)
    assert len(refused) == 1 and load_checkpoint(whole).step == 30


def test_equal_bits_are_asked_of_pytorch_and_no_longer_than_wanted(config, monkeypatch):
    import torch._inductor.config as inductor

    seen = []
    step = loop.train_step

    def look(run):
        fill = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.are_deterministic_algorithms_enabled(), fill))
        seen.append(getattr(inductor, "deterministic", True))
        step(run)

    monkeypatch.setattr(loop, "train_step", look)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train(MODEL, replace(config, steps=5), log=quiet)
    assert set(seen[::2]) == {(False, True)} and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen.clear()
    train(MODEL, replace(config, steps=5, deterministic=True, name="b"), log=quiet)
    assert set(seen[::2]) == {(True, False)} and set(seen[1::2]) == {True}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert not getattr(inductor, "deterministic", False)


def test_tokenizer_from_a_file_and_another_one(config, prepared, tmp_path):
    given = replace(config, tokenizer=str(prepared / "tokenizer.json"), steps=5)
    run = train(MODEL, replace(given, data=("fables:16",), val_fraction=0.3), log=quiet)
    assert (run / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    Tokenizer.train(["another text"] * 3, 260).save(tmp_path / "other.json")
    wrong = replace(given, name="wrong", tokenizer=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="another tokenizer"):
        train(MODEL, wrong, log=quiet)
    assert not (tmp_path / "wrong").exists()


def test_vocabulary_is_fitted_with_a_word_or_refused(config):
    said: list[str] = []
    roomy = replace(MODEL, vocab_size=400)
    run = train(roomy, replace(config, steps=5), log=said.append)
    assert said[0].startswith("vocab_size is 300, not 400")
    assert load_run(run)[0].vocab_size == 300
    train(roomy, replace(config, steps=6), resume=True, log=quiet)
    with pytest.raises(ValueError, match="300 ids, more than the model's vocab_size 290"):
        train(replace(MODEL, vocab_size=290), replace(config, name="b"), log=quiet)


def test_separate_validation_text(config, tmp_path):
    for name in ("learn", "check"):
        (tmp_path / f"{name}.txt").write_text(f"Words to {name} with, and more words. " * 60)
    learn, check = str(tmp_path / "learn.txt"), str(tmp_path / "check.txt")
    run = train(
        MODEL, replace(config, data=(learn,), val_data=(check,), steps=5, batch_size=2), log=quiet
    )
    assert metrics(run)[-1]["floor"] is None


def test_text_shorter_than_a_batch_and_missing_data(config, tmp_path):
    (tmp_path / "short.txt").write_text("Once.")
    for source, error in (("short.txt", ValueError), ("none.txt", FileNotFoundError)):
        with pytest.raises(error) as caught:
            train(MODEL, replace(config, data=(str(tmp_path / source),)), log=quiet)
        assert "\n" not in str(caught.value)
    train(MODEL, replace(config, steps=5), log=quiet)  # the name is still free


def test_unusable_device(config):
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match="is not usable"):
            train(MODEL, replace(config, device=device), log=quiet)


def test_prompt_longer_than_the_context_is_refused_at_the_start(config, tmp_path):
    with pytest.raises(ValueError, match="prompt"):
        train(MODEL, replace(config, sample_prompt="fox " * 99), log=quiet)
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [{}, {"graph": False}, {"graph": False, "compile": True}])
def test_equal_bits_on_a_gpu(config, how):
    plan = replace(config, device="cuda", deterministic=True, **how)
    run = train(MODEL, replace(plan, name="through"), log=quiet)
    with pytest.raises(Crash):
        train(MODEL, plan, log=crash_at(18))
    torch.compiler.reset()
    assert_same_run(train(MODEL, plan, resume=True, log=quiet), run)


def test_how_the_weights_began_is_not_asked_at_a_resume(config, whole):
    with pytest.raises(Crash):
        train(MODEL, config, log=crash_at(18))
    path = Path(config.runs_dir) / config.name / "config.json"
    old = json.loads(path.read_text())
    del old["model"]["residual_std"]  # as runs had it before there was the option
    path.write_text(json.dumps(old))
    model = replace(MODEL, init_std=0.5, residual_std=0.0)
    assert_same_run(train(model, config, resume=True, log=quiet), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(config):
    run = train(MODEL, replace(config, device="cuda"), log=quiet)
    assert load_checkpoint(run, "cuda").step == 24
