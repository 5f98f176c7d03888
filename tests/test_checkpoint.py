"""Checkpoints: nothing is lost to a kill, nothing is believed of a stranger's file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from apart import ROOT, python
from seeded import one_seed  # noqa: F401

import nanolm.checkpoint as store
from nanolm.checkpoint import Saver, load_checkpoint, locked, save_checkpoint, step_folders
from nanolm.data import read_documents
from nanolm.model import ModelConfig, Transformer
from nanolm.optim import AdamW
from nanolm.tokenizer import Tokenizer

MODEL = ModelConfig(
    vocab_size=260, n_layer=1, n_head=2, n_kv_head=1, d_model=8, d_ff=8, max_seq_len=8
)


@pytest.fixture
def pair():
    """A model that has taken a step, and its optimizer."""
    model = Transformer(MODEL)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    model.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def run(tmp_path, pair) -> Path:
    """A run with two checkpoints of the same weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    Tokenizer.train(read_documents(["fables:2"]), 260).save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps({"model": asdict(MODEL)}))
    for step in (1, 2):
        save_checkpoint(folder, *pair, step=step)
    return folder


# in the background


def test_what_is_saved_is_what_was_when_asked(run, pair, monkeypatch):
    model, optimizer = pair
    go, write = threading.Event(), store.write_file
    monkeypatch.setattr(store, "write_file", lambda *a: go.wait(10) and write(*a))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    moments = {name: x.clone() for name, x in store.pack_optimizer(model, optimizer).items()}
    saver = Saver(run)
    saver.save(model, optimizer, step=3)
    assert [folder.name[-1] for folder in step_folders(run)] == ["1", "2"]
    model.loss(torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    go.set()
    saver.wait()
    found = load_checkpoint(run, optimizer=True)
    assert found.step == 3
    assert all(torch.equal(x, before[name]) for name, x in found.model.state_dict().items())
    assert found.optimizer.keys() == moments.keys()
    assert all(torch.equal(x, moments[name]) for name, x in found.optimizer.items())
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_one_at_a_time_and_each_in_full(run, pair):
    with Saver(run, keep=9) as saver:
        for step in range(3, 8):
            with torch.no_grad():
                pair[0].norm.weight.fill_(step)
            saver.save(*pair, step=step)
    for folder in step_folders(run)[2:]:
        found = load_checkpoint(folder)
        assert set(found.model.norm.weight.tolist()) == {found.step}


def test_a_failure_is_raised_once_by_whoever_asks_next(run, pair, monkeypatch):
    def full(path: Path, content: bytes) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_file", full)
        for ask in (Saver.check, Saver.wait, lambda saver: saver.save(*pair, step=4)):
            saver = Saver(run)
            saver.save(*pair, step=3)
            saver.join()
            with pytest.raises(OSError, match="No space"):
                ask(saver)
            saver.check()
    assert load_checkpoint(run).step == 2 and not list(run.glob(".step-*"))
    saver.save(*pair, step=4)
    saver.wait()
    assert load_checkpoint(run).step == 4


def test_the_copies_are_used_again(run, pair):
    saver = Saver(run)
    saver.save(*pair, step=3)
    saver.wait()
    place = saver.shot.parts["model.safetensors"]["norm.weight"].data_ptr()
    saver.save(*pair, step=4)
    saver.wait()
    assert saver.shot.parts["model.safetensors"]["norm.weight"].data_ptr() == place


def test_a_deleted_checkpoint_is_never_half_there(run, pair, monkeypatch):
    seen = []
    remove = store.shutil.rmtree

    def look(path, *args, **kw):
        seen.extend(set(os.listdir(folder)) for folder in step_folders(run))
        remove(path, *args, **kw)

    monkeypatch.setattr(store.shutil, "rmtree", look)
    save_checkpoint(run, *pair, step=3, keep=1)
    assert [folder.name[-1] for folder in step_folders(run)] == ["3"]
    assert seen and all(len(names) == 3 for names in seen)


# one at a time


HOLD = """
import sys, time
from pathlib import Path
from nanolm.checkpoint import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_a_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training .*: give another name"):
            with locked(tmp_path / "a"):
                pytest.fail("two at a time")
        with locked(tmp_path / "b"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    assert (tmp_path / "a" / ".lock").exists()  # which says nothing
    with locked(tmp_path / "a"):
        pass


def test_a_lock_leaves_nothing_behind_but_what_was_made_inside(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "x" / "a"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "x" / "a"):
        (tmp_path / "x" / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "x" / "a").iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_a_lock_whose_file_is_taken_away_in_between_is_not_held(tmp_path, monkeypatch):
    import fcntl

    path, lock, calls = tmp_path / ".lock", fcntl.flock, []

    def late(file, how):
        lock(file, how)
        calls.append(file)
        if len(calls) == 1:
            path.unlink()  # the one before has just ended

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another process"), locked(tmp_path):
            pytest.fail("two at a time")
    assert len(calls) == 2


# promises


@pytest.mark.parametrize(
    "promise, match",
    [
        ({"n_layer": 10**9}, "bytes for"),
        ({"d_ff": 2**50}, "bytes for"),
        ({"vocab_size": 10**12}, "bytes for"),
        ({"max_seq_len": 10**12}, "max_seq_len"),
        ({"n_layer": 10**400}, "bytes for|config of a run"),
        ({"d_ff": 16}, "config.json makes it"),
        ({"n_layer": "x"}, "n_layer must be"),
        ({"hooks": "os.system"}, "config of a run"),
    ],
)
def test_a_config_cannot_ask_for_more_than_the_files_have(run, promise, match):
    (run / "config.json").write_text(json.dumps({"model": asdict(MODEL) | promise}))
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint(run, log=lambda line: None)
    assert "\n" not in str(error.value)


def test_many_layers_of_next_to_nothing_are_not_built(run, monkeypatch):
    """A file large enough for the weights of a million layers, but with the tensors of one."""
    monkeypatch.setattr(store, "check_promise", lambda *a: None)
    (run / "config.json").write_text(json.dumps({"model": asdict(MODEL) | {"n_layer": 10**9}}))
    with pytest.raises(ValueError, match="tensors for 1000000000 layers"):
        load_checkpoint(run / "step-000002")


@pytest.mark.parametrize("name", ["config.json", "step-000002/state.json"])
def test_deep_and_large_json(run, name):
    for text in ("[" * 200_000, " " * 2**20 + "{}"):
        (run / name).write_text(text)
        with pytest.raises(ValueError, match=Path(name).name) as error:
            load_checkpoint(run / "step-000002")
        assert "\n" not in str(error.value)


def test_moments_of_another_model(run, pair):
    model, optimizer = pair
    folder = step_folders(run)[-1]
    for wrong in ("nobody.weight/exp_avg", "norm.weight/exp_avg"):
        tensors = store.pack_optimizer(model, optimizer) | {wrong: torch.zeros(3)}
        state = store.read_state(folder)
        content = store.safetensors.torch.save(tensors)
        state["sha256"]["optimizer.safetensors"] = store.write_file(
            folder / "optimizer.safetensors", content
        )
        sealed = state | {"checksum": store.fingerprint(state)}
        (folder / "state.json").write_text(json.dumps(sealed))
        with pytest.raises(ValueError, match=f"{wrong} .* fits no weight"):
            load_checkpoint(folder, optimizer=True)
        assert load_checkpoint(folder).step == 2


def test_a_random_state_that_is_none(run):
    found = load_checkpoint(run)
    before = torch.get_rng_state()
    for wrong in ("", "zz", 3, None, "00" * 5056):
        found.state["rng"] = wrong
        with pytest.raises(ValueError, match="no random state") as error:
            store.restore_random(found)
        assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


# files from strangers, two thousand to each reader

FUZZ = """
import json, random, resource, shutil, signal, sys, tempfile
from dataclasses import asdict
from pathlib import Path
import torch
torch.set_num_threads(1)
from nanolm.checkpoint import *
from nanolm.checkpoint import fingerprint, restore_random, unpack_optimizer
from nanolm.data import Batches, TokenData, prepare, read_documents
from nanolm.model import ModelConfig, Transformer
from nanolm.optim import AdamW
from nanolm.tokenizer import Tokenizer, seal
import hashlib

home = Path(tempfile.mkdtemp())
tokenizer = Tokenizer.train(read_documents(["fables:4"]), 262)
run = prepare(["fables:4"], home / "run", tokenizer, val_fraction=0.5, workers=1)
config = ModelConfig(
    vocab_size=262, n_layer=1, n_head=2, n_kv_head=1, d_model=4, d_ff=4, max_seq_len=8
)
(run / "config.json").write_text(json.dumps({"model": asdict(config)}))
model = Transformer(config)
optimizer = AdamW(model.parameters())
model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
optimizer.step()
step = save_checkpoint(run, model, optimizer, step=1, data={"cursor": 1, "text": "x"})
state = json.loads((step / "state.json").read_text())
random.seed(0)
WILD = [b"9" * 30, b"-1", b"0", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"x"', b"true",
        b"[" * 5000, b"\\xff\\xfe", b"\\x00" * 9, b"1" * 5000, b'"\\\\ud800"',
        b"18446744073709551615"]

def mutated(content):
    content = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 5, 40])):
        at, n = random.randrange(len(content) + 1), random.choice([1, 1, 2, 8, 100, len(content)])
        how = random.randrange(6)
        if how == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif how == 1:
            del content[at : at + n]
        elif how == 2:
            content[at:at] = random.choice(WILD)
        elif how == 3:
            content[at:at] = content[at : at + n]
        elif how == 4:
            content[at : at + n] = random.randbytes(min(n, 16))
        else:  # a whole number of a JSON text
            digits = [i for i, c in enumerate(content[:4000]) if chr(c).isdigit()]
            if digits:
                at = random.choice(digits)
                end = at
                while end < len(content) and chr(content[end]).isdigit():
                    end += 1
                content[at:end] = random.choice(WILD)
        content = content or bytearray(b"{")
    return bytes(content)

def checkpoint():
    name = random.choice(["config.json", "step-000001/state.json", "step-000001/model.safetensors",
                          "step-000001/optimizer.safetensors"])
    yield run / name
    if random.random() < 0.7 and name.endswith("tensors"):  # as a stranger could
        digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
        sealed = {k: v for k, v in state.items() if k != "checksum"}
        sealed["sha256"] = {**state["sha256"], Path(name).name: digest}
        (step / "state.json").write_text(json.dumps(sealed | {"checksum": fingerprint(sealed)}))
    elif random.random() < 0.7 and name.endswith("state.json"):
        try:
            sealed = json.loads((run / name).read_bytes())
            sealed.pop("checksum", None)
            (run / name).write_text(json.dumps(sealed | {"checksum": fingerprint(sealed)}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    found = load_checkpoint(run, optimizer=True)
    unpack_optimizer(model, AdamW(model.parameters()), found.optimizer)
    restore_random(found)

def tokens():
    yield run / "tokenizer.json"
    if random.random() < 0.7:
        try:
            sealed = json.loads((run / "tokenizer.json").read_bytes())
            sealed.pop("sha256", None)
            sealed["sha256"] = seal(sealed)
            (run / "tokenizer.json").write_text(json.dumps(sealed))
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    Tokenizer.load(run / "tokenizer.json")

def shard():
    yield run / random.choice(["train-00000.json", "train-00000.json", "train-00000.bin"])
    data = TokenData(run, "train", verify=random.random() < 0.5)
    Batches(data, 1, 8).batch(0)

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
try:
    bytearray(2**30)
    raise SystemExit("the limit on memory does not hold")
except MemoryError:
    pass
kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
found = {}
for reader in (checkpoint, tokens, shard):
    counts = {"refused": 0, "loaded": 0}
    for i in range(2000):
        work = reader()
        path = next(work)
        path.write_bytes(mutated(kept[path]))
        signal.alarm(20)  # dies of it
        try:
            next(work, None)
            counts["loaded"] += 1
        except (ValueError, OSError) as error:
            assert "\\n" not in str(error), (path.name, str(error))
            counts["refused"] += 1
        except BaseException as error:
            what = f"{reader.__name__} {path.name} {i}: {type(error).__name__} {error}"
            raise SystemExit(f"{what} {path.read_bytes()[:300]}")
        signal.alarm(0)
        path.write_bytes(kept[path])
        (step / "state.json").write_bytes(kept[step / "state.json"])
    found[reader.__name__] = counts
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and limits on memory")
def test_two_thousand_hostile_files_to_each_reader():
    found = json.loads(python(FUZZ, OMP_NUM_THREADS="1").splitlines()[-1])
    for counts in found.values():
        assert counts["refused"] + counts["loaded"] == 2000
        assert counts["refused"] > 500 and counts["loaded"] > 5, found


# fifty deaths

KILLS = """
import json, os, random, signal, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch, torch._dynamo  # so that the children need not
torch.set_num_threads(1)
import nanolm.loss
from nanolm.data import prepare, read_documents
from nanolm.model import ModelConfig
from nanolm.tokenizer import Tokenizer
from nanolm.train import TrainConfig, load_checkpoint, metrics, step_folders, train

home = Path(tempfile.mkdtemp())
tokenizer = Tokenizer.train(read_documents(["fables:16"]), 300)
text = prepare(["fables:16"], home / "text", tokenizer, val_fraction=0.3, workers=1)
model = ModelConfig(
    vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_seq_len=32
)
config = TrainConfig(name="whole", runs_dir=str(home), data=(str(text),), steps=40, warmup_steps=4,
    batch_size=4, grad_accum=2, eval_every=10, eval_batches=2, sample_every=0, checkpoint_every=2,
    log_every=1, lr=3e-3, device="cpu")

def start(name, resume):
    "Train in a child; it writes what it logs to a file, and leaves with 0."
    child = os.fork()
    if child:
        return child
    try:
        with open(home / f"{name}.log", "a", buffering=1) as file:
            say = lambda line: file.write(line + "\\n")
            train(model, replace(config, name=name), resume=resume, log=say)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(7)

def facts(run):
    "All that must be equal."
    child = os.fork()  # nothing that needs autograd happens in this process
    if not child:
        found = load_checkpoint(run, optimizer=True, log=lambda l: os._exit(8))
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(run)]
        tensors = found.model.state_dict() | found.optimizer
        torch.save([rows, tensors, found.state], home / "facts")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return torch.load(home / "facts", weights_only=True)

began = time.time()
assert os.waitpid(start("whole", False), 0)[1] == 0
span = (time.time() - began) / 2  # a run is killed within this time, however busy the machine
whole = facts(home / "whole")
random.seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
kills, inside, finished, name, before = 0, 0, 0, "run0", 0
while kills < 50:
    run = home / name
    child = start(name, (run / "config.json").exists())
    time.sleep(random.uniform(0, span))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        for one, other in zip(facts(run), whole):
            if isinstance(one, dict) and "norm.weight" in one:
                assert one.keys() == other.keys()
                assert all(torch.equal(one[k], other[k]) for k in one)
            else:
                assert one == other
        finished, name, before = finished + 1, f"run{finished + 1}", 0
        span *= 0.8
        continue
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills, inside = kills + 1, inside + any(run.glob(".step-*"))
    log = home / f"{name}.log"
    said = log.read_text().splitlines() if log.exists() else []
    lines = [line for line in said if line.startswith("step ")]
    log.write_text("")
    saved = step_folders(run)
    newest = 0
    if saved:
        newest = load_checkpoint(run, optimizer=True, log=lambda l: sys.exit(l)).step
        assert newest == int(saved[-1].name[5:]), "the newest was damaged"
    assert newest >= before, (newest, before)
    if lines:  # every second step is saved: one checkpoint may have been under way
        assert newest >= int(lines[-1][5:7]) // 2 * 2 - 2, (newest, lines[-1])
    span *= 1.1 if newest == before else 1
    before = newest
seconds = time.time() - began
print(json.dumps({"kills": kills, "inside": inside, "finished": finished, "seconds": seconds}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_fifty_random_moments():
    found = json.loads(python(textwrap.dedent(KILLS), OMP_NUM_THREADS="1").splitlines()[-1])
    assert found["kills"] == 50
    assert found["inside"] >= 10, found  # while a checkpoint was being written
    assert found["finished"] >= 2, found  # and was the run that nobody killed, bit for bit
