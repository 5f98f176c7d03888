"""Several processes: the same step whoever shares it, one writer, and no waiting for the dead."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from apart import ROOT, python
from seeded import one_seed  # noqa: F401

from nanolm.model import ModelConfig, Transformer
from nanolm.optim import AdamW
from nanolm.parallel import Team, join_team
from nanolm.step import GraphedStep

# Processes of a team are forked from one that has imported everything: it is much quicker.
SETUP = """
import json, os, signal, socket, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch, torch._dynamo, torch.distributed
torch.set_num_threads(1)
import nanolm.loss, nanolm.parallel
from nanolm.data import prepare, read_documents
from nanolm.model import ModelConfig, Transformer
from nanolm.tokenizer import Tokenizer
from nanolm.train import TrainConfig, load_checkpoint, metrics, step_folders, train
loop = sys.modules["nanolm.train"]
home = Path(tempfile.mkdtemp())
tokenizer = Tokenizer.train(read_documents(["fables:16"]), 300)
text = prepare(["fables:16"], home / "text", tokenizer, val_fraction=0.3, workers=1)
model = ModelConfig(
    vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, max_seq_len=32
)
plan = TrainConfig(
    runs_dir=str(home), data=(str(text),), steps=12, warmup_steps=4, batch_size=2, grad_accum=2,
    eval_every=4, eval_batches=3, sample_every=6, checkpoint_every=4, log_every=2, lr=3e-3,
    grad_clip=0.5, device="cpu",
)

def together(size, work):
    "Do some work in so many processes of a team; their exit codes, and how long it took."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    began, children = time.time(), []
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(value) for name, value in env.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            try:
                work(rank)
                sys.stdout.flush()
                os._exit(0)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(7)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, time.time() - began

def goes(size, name, **changes):
    "Train in so many processes, each of which shows what it logs."
    config, resume = replace(plan, name=name, **changes), (home / name).exists()
    def work(rank):
        train(model, config, resume=resume, log=lambda line: print(f"{name} {rank}: {line[:70]}"))
    return together(size, work)[0]
"""

SAME = """
for name, size, share in (("1x4", 1, 4), ("2x2", 2, 2), ("4x1", 4, 1)):
    assert goes(size, name, grad_accum=share) == [0] * size
assert goes(2, "mixed", grad_accum=2, steps=6) == [0, 0]
assert goes(1, "mixed", grad_accum=2, steps=8) == [0]     # which takes over for the other
assert goes(4, "mixed", grad_accum=4, steps=12) == [0] * 4
def facts():
    rows = {name: metrics(home / name) for name in ("1x4", "2x2", "4x1", "mixed")}
    weights = {name: load_checkpoint(home / name).model.state_dict() for name in rows}
    far = {
        name: max((x - weights["1x4"][k]).abs().max().item() for k, x in weights[name].items())
        for name in weights
    }
    start = Transformer(model).state_dict()
    moved = max((x - start[k]).abs().max().item() for k, x in weights["1x4"].items())
    state = load_checkpoint(home / "4x1").state["data"]["cursor"]
    print(json.dumps({"rows": rows, "far": far, "moved": moved, "cursor": state}))
assert together(1, lambda rank: facts())[0] == [0]
"""


@pytest.fixture(scope="module")
def same():
    lines = python(SETUP + SAME, OMP_NUM_THREADS="1").splitlines()
    return lines[:-1], json.loads(lines[-1])


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@forks
def test_the_same_step_however_it_is_shared_out(same):
    rows = same[1]["rows"]
    assert max(row.get("grad_norm", 0) for row in rows["1x4"]) > 0.5  # it was clipped
    for name in ("2x2", "4x1"):
        assert len(rows[name]) == len(rows["1x4"]) == 12 + 3
        for one, other in zip(rows["1x4"], rows[name], strict=True):
            for key in ("step", "loss", "lr", "grad_norm", "val_loss"):
                assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4), (name, key)
        assert same[1]["far"][name] < 1e-3 < 1e-2 < same[1]["moved"]


@forks
def test_a_run_goes_on_with_another_number_of_processes(same):
    assert same[1]["far"]["mixed"] < 0.02  # another schedule, since its length grew
    assert [r["step"] for r in same[1]["rows"]["mixed"] if "loss" in r] == list(range(1, 13))
    said = [line for line in same[0] if "grad_accum" in line]
    assert "grad_accum is 4, not 2: 4 micro-batches make a step of this run" in said[0]
    assert "grad_accum is 1, not 4" in said[1]
    assert same[1]["cursor"] == 12 * 4


@forks
def test_only_the_first_process_writes_and_speaks(same):
    assert {line.partition(":")[0] for line in same[0]} == {"1x4 0", "2x2 0", "4x1 0", "mixed 0"}
    assert sum(line.startswith("2x2 0: ┌─ step") for line in same[0]) == 2  # samples, once each
    assert all(row.get("step") for rows in same[1]["rows"].values() for row in rows)


STOPS = """
def stop(rank):
    step = loop.train_step
    def train_step(run):
        step(run)
        if run.step == 5 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a terminal and torchrun may both say so
    loop.train_step = train_step
    train(model, replace(plan, name="stopped"), log=lambda line: print("log:", line))
    print(f"rank {rank} left at {step_folders(home / 'stopped')[-1].name}\\n", end="")

assert together(2, stop)[0] == [0, 0]
assert goes(2, "stopped") == [0, 0]
assert goes(2, "whole") == [0, 0]
def facts():
    for what in (lambda c: c.model.state_dict(), lambda c: c.optimizer):
        one, two = (what(load_checkpoint(home / n, optimizer=True)) for n in ("whole", "stopped"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(home / n)
         if "loss" in row]
        for n in ("whole", "stopped")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 12
assert together(1, lambda rank: facts())[0] == [0]
"""


@forks
def test_all_stop_at_the_same_step_and_two_go_on_bit_for_bit():
    said = python(SETUP + STOPS, OMP_NUM_THREADS="1").splitlines()
    left = sorted(line for line in said if "left at" in line)
    places = {line.split()[-1] for line in left}
    assert len(left) == 2 and places == {"step-000006"}  # the vote is read a step later
    assert any("stopped and saved after step 6; go on with" in line for line in said)


DEATHS = """
def dies(how):
    def work(rank):
        step, name = loop.train_step, how.__name__
        def train_step(run):
            if run.step == 5 and rank == 1:
                how()
            step(run)
        loop.train_step = train_step
        train(model, replace(plan, name=name, steps=2000, eval_every=0, sample_every=0),
              log=lambda line: None)
    codes, seconds = together(2, work)
    print(json.dumps({how.__name__: codes, "seconds": seconds}))

def killed(): os.kill(os.getpid(), signal.SIGKILL)
def raises(): raise ValueError("a reason of its own")
dies(killed)
dies(raises)

def full(rank):
    def no_room(path, content):
        raise OSError(28, "No space left on device")
    sys.modules["nanolm.checkpoint"].write_file = no_room
    train(model, replace(plan, name="full", steps=2000), log=lambda line: None)
print(json.dumps({"full": together(2, full)[0]}))

def no_text(rank):
    train(model, replace(plan, name="none", data=(str(home / "nowhere"),)), log=print)
print(json.dumps({"no_text": together(2, no_text)[0]}))

def taken(rank):
    train(model, replace(plan, name="killed"), log=print)
print(json.dumps({"taken": together(2, taken)[0]}))
"""


@forks
def test_a_process_that_ends_early_ends_the_run_with_its_reason():
    began = time.time()
    said = python(SETUP + DEATHS, OMP_NUM_THREADS="1").splitlines()
    assert time.time() - began < 120
    found = {}
    for line in said:
        if line.startswith("{"):
            found |= json.loads(line)
    assert found["killed"] == [7, -9]
    assert [found[name] for name in ("raises", "full", "no_text", "taken")] == [[7, 7]] * 4
    lost = [line for line in said if "has lost another" in line]
    assert len(lost) == 5 and all("ConnectionError: process" in line for line in lost)
    assert "rank 1: ValueError: a reason of its own" in said
    assert any("rank 0: OSError: stopped at step" in line for line in said)
    assert any("rank 0: FileNotFoundError" in line for line in said)
    assert any("already holds a run" in line for line in said)


FRAGILE = """
import os, signal, sys
from nanolm.__main__ import main
loop = sys.modules["nanolm.train"]
step = loop.train_step
def train_step(run):
    if run.step == 3 and run.team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(run)
loop.train_step = train_step
raise SystemExit(main())
"""


def test_torchrun_does_not_hang_when_one_is_killed(tmp_path):
    (tmp_path / "fragile.py").write_text(FRAGILE)
    words = "--data fables:40 --vocab-size 300 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16"
    words += " --d-ff 16 --max-seq-len 32 --steps 500 --warmup-steps 2 --batch-size 2 --device cpu"
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--standalone", "fragile.py", "train", *words.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=150)
    assert done.returncode != 0
    assert "process 0 of 2 has lost another" in done.stderr
    assert "exitcode  : -9" in done.stderr


# one process, and those that cannot begin


def test_a_team_of_one_does_nothing():
    team, x = join_team("cpu"), torch.arange(3.0)
    team.mean([x])
    team.alike([x])
    team.wait()
    assert (team.rank, team.size, team.main) == (0, 1, True) and x.tolist() == [0, 1, 2]
    assert team.any(True) and not team.any(False)
    error = RuntimeError("gloo says nothing to one alone")
    assert team.lost(error) is error
    team.leave()
    assert not torch.distributed.is_initialized()


def test_only_what_the_others_did_is_blamed_on_them():
    team = Team(rank=1, size=2)
    for text in ("shape mismatch", "CUDA out of memory"):
        error = RuntimeError(text)
        assert team.lost(error) is error
    lost = team.lost(RuntimeError("[gloo/pair.cc:1] Connection closed by peer\nstack"))
    assert isinstance(lost, ConnectionError) and "\n" not in str(lost)


@pytest.mark.parametrize(
    "device, match", [("cuda:0", "give cuda, not cuda:0"), ("cuda", "processes for . cards")]
)
def test_a_card_that_is_not_there(monkeypatch, device, match):
    for name, value in {"LOCAL_RANK": 99, "WORLD_SIZE": 100, "LOCAL_WORLD_SIZE": 100}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=match) as error:
        join_team(device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 3])
def test_the_recorded_step_averages_before_it_clips(count):
    config = ModelConfig(vocab_size=31, n_layer=1, d_model=16, n_head=2, d_ff=16, max_seq_len=8)
    norms, given = [], []

    def reduce(rows):
        given.append([row.clone() for row in rows])
        for row in rows:
            row.mul_(0.5)

    for function in (None, reduce):
        torch.manual_seed(0)
        model = Transformer(config)
        options = {"dtype": torch.float32, "grad_clip": 1e-3}
        optimizer = AdamW(model.parameters(), lr=1e-2)
        step = GraphedStep(model, optimizer, grad_accum=count, reduce=function, **options)
        ids = torch.randint(31, (count, 2, 9), generator=torch.Generator().manual_seed(1))
        norms.append(step([(rows[:, :-1], rows[:, 1:]) for rows in ids])[1])
        moment = optimizer.state[model.embedding.weight]["exp_avg"]
        assert 0 < moment.norm() <= 1e-3 * (1 - 0.9) * 1.01  # clipped after it
    assert len(given) == 1  # once a step, whatever the number of micro-batches
    torch.testing.assert_close(norms[1], norms[0] / 2)
    joint = torch.stack([row.norm() for row in given[0]]).norm() / count  # rows are sums
    torch.testing.assert_close(joint, norms[0])
