"""The frame of benchmarks: its statistics, its fairness, its refusals; never a speed."""

import contextlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanolm import bench
from nanolm.__main__ import main
from nanolm.bench import AttentionShape, Timing, bench_attention, contest, race, report, stopwatch
from nanolm.data import fables

TIMES = st.lists(st.floats(1e-7, 10), min_size=1, max_size=60)
EASY = {"amount": 1.0, "unit": "FLOP", "tolerance": 1e-3, "repeats": 3}


# ---- statistics ----------------------------------------------------------------------------------


@given(TIMES, st.floats(0, 1))
def test_quantiles_are_numpys(times, share):
    timing = Timing(tuple(times))
    assert math.isclose(timing.quantile(share), np.quantile(times, share), rel_tol=1e-9)
    assert math.isclose(timing.median, np.median(times), rel_tol=1e-9)


def test_one_sample_is_its_own_quantiles():
    assert {Timing((0.25,)).quantile(share) for share in (0, 0.1, 0.5, 1)} == {0.25}


# ---- the clock -----------------------------------------------------------------------------------


class Clock:
    """Time passes only by `work`; what is shown moves in ticks."""

    def __init__(self, tick=0.0, cold=0.0):
        self.now, self.tick, self.cold = 0.0, tick, cold

    def work(self, seconds):
        self.now += seconds + self.cold
        self.cold = 0.0

    def __call__(self):
        return math.floor(self.now / self.tick) * self.tick if self.tick else self.now


@pytest.mark.parametrize("seconds", [3e-7, 1e-4, 0.02])
@pytest.mark.parametrize("tick", [0.0, 1e-6, 1e-3])
def test_a_coarse_clock_and_a_cold_start_are_overcome(seconds, tick):
    clock = Clock(tick, cold=5.0)
    sample = stopwatch(lambda: clock.work(seconds), clock, span=max(100 * tick, 1e-6))
    assert math.isclose(sample()(), seconds, rel_tol=0.02)


def test_a_slow_function_is_called_once_a_sample():
    clock, calls = Clock(), []
    sample = stopwatch(lambda: (calls.append(1), clock.work(1.0)), clock)
    calls.clear()
    sample()
    assert len(calls) == 1


def test_a_clock_that_stands_still_ends_all_the_same(monkeypatch):
    monkeypatch.setattr(bench, "range", lambda n: range(min(n, 2)), raising=False)
    assert bench.enough_calls(lambda: None, lambda: 0.0, span=1.0) == 2**20


# ---- turns ---------------------------------------------------------------------------------------


def traced_race(names, repeats):
    order = []

    def sampler(name):
        return lambda: (order.append(name), lambda: 1.0)[1]

    return order, race({name: sampler(name) for name in names}, repeats)


def test_everybody_runs_once_a_round():
    order, timings = traced_race("abc", 40)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 40 and all(sorted(one) == list("abc") for one in rounds)
    assert all(len(timing.samples) == 40 for timing in timings.values())
    assert list(timings) == list("abc")


def test_nobody_always_follows_the_same():
    order, _ = traced_race("abc", 60)
    pairs = Counter(itertools.pairwise(order))
    assert all(pairs[pair] >= 10 for pair in itertools.permutations("abc", 2)), pairs
    assert traced_race("abc", 60)[0] == order, "the same order tomorrow"


def test_a_drift_hits_all_alike():
    clock = Clock()
    names = {"short": 1e-3, "long": 2e-3}
    work = {n: lambda s=s: clock.work(s * (1 + clock.now)) for n, s in names.items()}
    timings = race({n: stopwatch(f, clock, span=1e-6) for n, f in work.items()}, 100)
    assert clock.now > 0.3, "the machine has slowed down by much"
    assert abs(timings["long"].median / timings["short"].median / 2 - 1) < 0.03


def test_readings_are_taken_after_all_samples():
    events = []
    samplers = {"a": lambda: (events.append("sample"), lambda: events.append("read") or 1.0)[1]}
    race(samplers, 3)
    assert events == ["sample"] * 3 + ["read"] * 3


@pytest.mark.parametrize("repeats", [0, -3])
def test_no_repeats_is_refused(repeats):
    with pytest.raises(ValueError, match="at least 1"):
        race({}, repeats)


def test_timed_on_a_cpu():
    timings = bench.timed({"one": lambda: 1, "two": lambda: 2}, repeats=4)
    assert list(timings) == ["one", "two"]
    assert all(len(t.samples) == 4 and min(t.samples) > 0 for t in timings.values())


def test_rotating_goes_round():
    calls = bench.rotating(lambda a, b: a + b, [(1, 1), (2, 2), (3, 3)])
    assert [calls() for _ in range(7)] == [2, 4, 6, 2, 4, 6, 2]


# ---- a GPU that is not there ---------------------------------------------------------------------


class Pretend:
    """As much of `torch.cuda` as `graphed` needs: a queue with a time of its own (seconds)."""

    def __init__(self):
        self.now, self.host, self.recording, self.live = 0.0, 0.0, None, 0
        self.CUDAGraph, self.Stream = (lambda: Pretend.Graph(self)), (lambda: self)
        self.Event = lambda enable_timing: Pretend.Mark(self)

    class Graph:
        def __init__(self, gpu):
            self.gpu, self.work = gpu, []

        def replay(self):
            self.gpu.now += sum(self.work)

    class Mark:
        def __init__(self, gpu):
            self.gpu, self.at, self.known = gpu, None, False

        def record(self):
            self.at = self.gpu.now

        def synchronize(self):
            self.known = True

        def elapsed_time(self, end):
            assert end.known, "read before it was waited for"
            return 1000 * (end.at - self.at)

    def launch(self, seconds):
        self.host += 5e-6
        if self.recording is None:
            self.now += seconds
        else:
            self.recording.work.append(seconds)

    def synchronize(self):
        assert self.recording is None, "no waiting while recording"
        self.host = max(self.host, self.now)

    def wait_stream(self, other):
        pass

    def current_stream(self):
        return self

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.recording = graph
        yield
        self.recording = None


def test_graphs_time_the_gpu_and_not_the_host(monkeypatch):
    gpu = Pretend()
    monkeypatch.setattr(bench.torch, "cuda", gpu)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.host)
    works = {"short": 2e-6, "long": 4e-6, "long enough": 3e-3}
    jobs = {name: lambda s=seconds: gpu.launch(s) for name, seconds in works.items()}
    timings = bench.timed(jobs, repeats=5, device="cuda")
    for name, seconds in works.items():
        assert math.isclose(timings[name].median, seconds, rel_tol=1e-6), name


class Output:
    live = 0

    def __init__(self):
        Output.live += 1

    def __del__(self):
        Output.live -= 1


def test_recorded_outputs_stay_alive_as_long_as_the_sampler(monkeypatch):
    gpu = Pretend()
    monkeypatch.setattr(bench.torch, "cuda", gpu)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.host)
    sample = bench.graphed(lambda: (gpu.launch(1e-4), Output())[1])
    assert Output.live >= 16
    del sample
    assert Output.live == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: CUDA graphs are not replayed")
def test_on_a_gpu_ten_times_the_bytes_take_longer():
    small, large = (torch.ones(n << 20, device="cuda") for n in (16, 160))  # 64 and 640 MB
    jobs = {"small": small.clone, "large": large.clone}
    timings = bench.timed(jobs, repeats=10, device="cuda")
    assert 3 < timings["large"].median / timings["small"].median < 30


# ---- fast and wrong ------------------------------------------------------------------------------


def lost():
    raise ImportError("cannot import name 'f' from 'lib' (/home/someone/lib/python/lib.py)\nmore")


X = torch.arange(1.0, 9.0)
HONEST = {"nanolm": lambda: X + X, "peer": lambda: 2 * X}


def rows_of(**contestants):
    return {row["contestant"]: row for row in contest("doubling", "forward", contestants, **EASY)}


def test_who_agrees_is_timed():
    rows = rows_of(**HONEST)
    assert list(rows) == ["nanolm", "peer"] and rows["nanolm"]["ratio"] == 1
    peer, ours = rows["peer"], rows["nanolm"]
    assert peer["ratio"] == peer["median_us"] / ours["median_us"]
    assert peer["p10_us"] <= peer["median_us"] <= peer["p90_us"]
    assert peer["error"] == 0 and peer["unit"] == "FLOP/s" and peer["repeats"] == 3
    assert math.isclose(peer["rate"], 1e6 / peer["median_us"])


WRONG = {
    "zeros": lambda: torch.zeros(8),
    "off": lambda: 2.01 * X,
    "one NaN": lambda: 2 * X * (X - 1) / (X - 1),
    "one infinity": lambda: 2 * X + 1 / (X - 1),
    "short": lambda: 2 * X[:7],
    "broadcast": lambda: 2 * X[None],
    "one too many": lambda: (2 * X, X),
    "nothing": lambda: None,
    "absent": lost,
    "out of room": lambda: (_ for _ in ()).throw(MemoryError("no room")),
}


@pytest.mark.parametrize("name", WRONG)
def test_who_is_wrong_or_absent_is_named(name):
    rows = rows_of(**HONEST, **{name: WRONG[name]})
    assert set(rows[name]) == {"title", "work", "contestant", "skipped"}
    assert "skipped" not in rows["peer"] and rows["nanolm"]["ratio"] == 1
    assert "\n" not in rows[name]["skipped"] and rows[name]["skipped"]


@pytest.mark.parametrize("name", WRONG)
def test_ours_gets_no_mercy(name):
    rows = rows_of(nanolm=WRONG[name], peer=HONEST["peer"])
    assert "skipped" in rows["nanolm"]
    assert rows["peer"]["ratio"] is None and rows["peer"]["median_us"] > 0


def test_a_wrong_gradient_is_caught_behind_a_right_output():
    peer = {"peer": lambda: (X, 2 * X), "nanolm": lambda: (X, 2.1 * X)}
    assert "wrong by" in rows_of(**peer)["nanolm"]["skipped"]


def test_a_peer_full_of_nan_is_not_the_judge():
    rows = rows_of(nanolm=HONEST["nanolm"], broken=WRONG["one NaN"], peer=HONEST["peer"])
    assert "wrong by nan" in rows["broken"]["skipped"]
    assert rows["peer"]["ratio"] and rows["nanolm"]["error"] == 0


def test_the_judge_is_the_first_peer_and_never_ours():
    rows = rows_of(nanolm=WRONG["off"], peer=HONEST["peer"], other=HONEST["peer"])
    assert "wrong" in rows["nanolm"]["skipped"] and "skipped" not in rows["other"]


def test_small_errors_do_not_add_up():
    far = {"first": lambda: X, "second": lambda: 1.0008 * X, "nanolm": lambda: 1.0016 * X}
    rows = rows_of(**far)
    assert "skipped" not in rows["second"] and "wrong by 0.0016" in rows["nanolm"]["skipped"]


def test_one_who_fails_at_the_clock_is_named_too():
    patience = iter(range(2))

    def tires():
        if next(patience, None) is None:
            raise RuntimeError("no more")
        return 2 * X

    rows = rows_of(**HONEST, tires=tires)
    assert rows["tires"]["skipped"] == "RuntimeError: no more" and rows["nanolm"]["ratio"] == 1


def test_nobody_left_is_no_error():
    rows = rows_of(nanolm=lost, peer=lost)
    assert all("skipped" in row for row in rows.values())
    assert bench.table(list(rows.values())).count("skipped: ") == 2


def test_reasons_name_no_folder():
    told = bench.reason(ImportError("cannot import 'f' (/home/someone/lib/f.py)\nsecond line"))
    assert told == "ImportError: cannot import 'f' (f.py)"
    assert bench.reason(ValueError()) == "ValueError: "
    assert "8/2" in bench.reason(ValueError("heads 8/2"))


# ---- attention -----------------------------------------------------------------------------------

HEADS = st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)])


@given(st.integers(1, 3), HEADS, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_flops_are_those_of_the_products(B, heads, T, D, causal):
    shape = AttentionShape(B, *heads, T, D)
    pairs = sum(1 for i in range(T) for j in range(T) if not causal or j <= i)
    exact = B * heads[0] * pairs * (2 * D + 2 * D)
    diagonal = B * heads[0] * T * 2 * D if causal else 0
    assert shape.flops("forward", causal) == exact - diagonal
    assert shape.flops("forward+backward", causal) == 3.5 * shape.flops("forward", causal)


@pytest.mark.parametrize("causal", [True, False])
def test_the_naive_contestant_is_attention_and_costs_what_is_said(causal):
    shape = AttentionShape(2, 6, 3, 33, 16)
    ((q, k, v, grad),) = bench.attention_inputs(shape, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        found = bench.attend_once(
            bench.naive_attention, "forward+backward", causal, q, k, v, grad.detach()
        )
    assert counter.get_total_flops() == 3 * shape.flops("forward", causal=False)  # of 3.5
    right = bench.attend_once(bench.sdpa, "forward+backward", causal, q, k, v, grad.detach())
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in (q, q, k, v)]
    assert bench.relative_error(found, right) < 1e-5


STAND_INS = {
    "nanolm": lambda q, k, v, causal: bench.sdpa(q, k, v, causal),
    "SDPA": bench.sdpa,
    "naive PyTorch": bench.naive_attention,
    "reads ahead": lambda q, k, v, causal: bench.sdpa(q, k, v, False),
    "no scale": lambda q, k, v, causal: bench.sdpa(q * 4, k, v, causal),
}


def small(**options):
    options = {"contestants": STAND_INS, "repeats": 2, "device": "cpu"} | options
    return list(bench_attention(["2,4,2,24,16", (1, 2, 1, 7, 8)], **options))


def test_every_shape_work_and_contestant_has_its_row():
    rows = small()
    keys = [(tuple(row["shape"]), row["work"], row["contestant"]) for row in rows]
    shapes = [(2, 4, 2, 24, 16), (1, 2, 1, 7, 8)]
    assert keys == list(itertools.product(shapes, bench.WORKS, STAND_INS))
    skipped = {row["contestant"] for row in rows if "skipped" in row}
    assert skipped == {"reads ahead", "no scale"}
    assert all(row["causal"] and row["dtype"] == "float32" and row["sets"] == 1 for row in rows)


def test_without_a_peer_to_agree_with_ours_is_not_timed():
    def absent():
        raise ImportError("not here")

    rows = list(contest("t", "w", {"nanolm": lambda: torch.zeros(3), "peer": absent}, **EASY))
    assert [row["skipped"] for row in rows][0] == "ValueError: no peer is left to agree with"


def test_a_device_may_be_named_in_full(monkeypatch):
    monkeypatch.setattr(bench, "graphed", lambda function: "graph")
    names = ("cuda", "cuda:0", torch.device("cuda", 1))
    assert [bench.sampler(min, device) for device in names] == ["graph"] * 3


def test_types_without_a_meaning_here_are_refused():
    for dtype in ("foo", "nn", "int8"):
        with pytest.raises(ValueError, match="not among the dtypes"):
            list(bench.bench_ceilings(dtype=dtype, device="cpu"))


def test_inputs_that_fit_no_memory_are_one_error():
    with pytest.raises(ValueError, match="no memory for the inputs of B999999"):
        list(bench_attention(["999999,9999,9999,9999,999"], device="cpu"))


def test_full_attention_may_read_ahead():
    rows = small(causal=False)
    assert {row["contestant"] for row in rows if "skipped" in row} == {"no scale"}
    assert "full" in rows[0]["title"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_admitted(dtype):
    rows = small(dtype=dtype)
    assert {row["contestant"] for row in rows if "skipped" in row} == {"reads ahead", "no scale"}


def test_a_missing_kernel_and_engines_without_a_gpu_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nanolm.flash", None)
    rows = list(bench_attention(["1,2,1,8,8"], repeats=2, device="cpu"))
    told = {row["contestant"]: row.get("skipped") for row in rows}
    assert "flash" in told["nanolm"] and "ModuleNotFoundError" in told["nanolm"]
    assert told["SDPA cuDNN"] == told["SDPA FlashAttention-2"] == "RuntimeError: needs a CUDA GPU"
    assert told["SDPA"] is None and told["naive PyTorch"] is None


def test_scores_that_cannot_fit_are_refused(monkeypatch):
    class Card:
        total_memory = 80e9

    class Large:
        is_cuda, device, shape = True, "cuda", (4, 16, 16384, 128)

        def __getitem__(self, index):
            return torch.empty(4, 16, 16384, device="meta")

        def size(self, dim):
            return self.shape[dim]

        def element_size(self):
            return 2

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    with pytest.raises(MemoryError, match="275 GB of 80"):
        bench.demand_room(Large())


BAD_SHAPES = ["64,8", "a,b,c,d,e", "1,2,3,4,5,6", "0,1,1,8,8", "1,-2,1,8,8", "", "1,2,1,8,8.5"]


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_malformed_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="give B,H,H_KV,T,D"):
        AttentionShape.of(shape)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="8 query heads"):
        AttentionShape.of("1,8,3,16,8")
    assert (
        AttentionShape.of("1,8,2,16,4") == AttentionShape.of([1, 8, 2, 16, 4]) == (1, 8, 2, 16, 4)
    )


# ---- results -------------------------------------------------------------------------------------


def test_machine_says_what_and_not_whose():
    found = bench.machine()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and found["machine"]
    assert {"python", "torch", "nanolm"} <= set(found["versions"])
    text = json.dumps(found)
    assert "/" not in text and __import__("platform").node() not in text


def test_report_shows_every_row():
    rows = small()
    text = report({"what": "a test"} | bench.machine() | {"rows": rows})
    assert text.count("attention, B") == 2 and text.count("skipped") == 8
    assert text.count("1.00x") >= 4 and "TFLOP/s" in text
    assert max(len(line) for line in text.splitlines() if "skipped" not in line) <= 100


def test_the_command_keeps_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.CASES, "attention", bench_attention)
    path = tmp_path / "kept.json"
    line = f"bench attention --full --shape 1,4,2,16,8 1,2,2,9,8 --repeats 2 --json {path}"
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert report(kept).split() == shown.split()
    assert kept["command"] == line.replace(str(path), "kept.json").replace(
        "bench", "nanolm bench", 1
    )
    assert str(tmp_path) not in path.read_text()
    assert len(kept["rows"]) == 2 * 2 * len(bench.ATTENTION) and not kept["rows"][0]["causal"]
    assert kept == json.loads(json.dumps(kept))


MISTAKES = {
    "bench": "CASE",
    "bench attenton": "did you mean attention",
    "bench attention --shape 64,8": "give B,H,H_KV,T,D",
    "bench attention --shape 1,8,3,16,8": "8 query heads",
    "bench attention --shape 1,2,1,8,8 1,2": "give B,H,H_KV,T,D",
    "bench attention --dtype int8": "float32, float16, bfloat16",
    "bench attention --shape 1,2,1,8,8 --repeats 0": "at least 1",
    "bench attention --repeats many": "invalid int",
    "bench attention --json nowhere/kept.json": "cannot be written",
    "bench attention --json .": "cannot be written",
    "bench attention --horns 2": "unrecognized",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_each_mistake_gets_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    (line,) = shown.err.strip().splitlines()
    assert MISTAKES[words] in line
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- programs of their own


def test_programs_are_run_apart_and_compared():
    programs = {
        "nanolm": "answer(0.25, check='a')",
        "peer": "answer(0.5, check='a')",
        "liar": "answer(0.1, check='b')",
        "absent": "import nobody_has_this",
        "mute": "pass",
    }
    rows = list(bench.compare_programs("t", "w", programs, {"cores": 1}, amount=3, repeats=2))
    found = {row["contestant"]: row for row in rows}
    assert found["absent"]["skipped"].endswith("No module named 'nobody_has_this'")
    assert "skipped" in found["mute"]
    assert found["peer"]["ratio"] == 2 and found["peer"]["error"] == 0
    assert found["liar"]["error"] == 1 and found["nanolm"]["rate"] == 12
    assert found["nanolm"]["repeats"] == 2 and "MB" in bench.table(rows)
    alone = {"nanolm": "answer(0.25, check='a')", "peer": "answer(0.5, check='b')"}
    rows = list(bench.compare_programs("t", "w", alone, {"cores": 1}, amount=3, repeats=1))
    assert rows[0]["skipped"] == "wrong: 100.0% differs"


def test_tokens_are_compared_one_by_one():
    ours, same = {"tokens": ["61", "62", "63"]}, {"tokens": ["61", "62", "63"]}
    assert bench.differing(ours, same) == 0
    assert 0 < bench.differing(ours, {"tokens": ["62", "61", "63"]}) < 1e-6
    assert bench.differing(ours, {"tokens": ["61", "62", "64"]}) == pytest.approx(1 / 3)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_is_that_of_the_whole_tree():
    program = "import subprocess; subprocess.run([sys.executable, '-c', HOLD]); answer(1)"
    hold = "x = b'x' * 10**8; import time; time.sleep(0.5)"
    found = bench.run_program(f"HOLD = {hold!r}\n{program}", {"cores": 1})
    assert 100 < found["peak_mb"] < 200


def test_tokenizers_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "KINDS", bench.KINDS[:2])
    texts = "".join(f"{text}\n<|endoftext|>\n" for text in fables(900))
    (tmp_path / "text.txt").write_text(texts, encoding="utf-8")
    line = f"bench tokenizer --text {tmp_path / 'text.txt'} --sizes 0.2 --unseen 0.1 --cores 1"
    kept = tmp_path / "kept.json"
    assert main(f"{line} --vocab-size 900 --repeats 1 --json {kept}".split()) == 0
    result = json.loads(kept.read_text())
    rows = {(row["work"], row["contestant"]): row for row in result["rows"]}
    for work, peer in (("train on 0.2 MB", "tokenizers"), ("encode, 1 core", "tiktoken, lists")):
        assert rows[work, "nanolm"]["error"] == rows[work, peer]["error"] == 0
        assert rows[work, "nanolm"]["ratio"] == 1 and rows[work, peer]["ratio"] > 0
    assert all(row["cores"] == 1 and "skipped" not in row or row["contestant"] == "rustbpe"
               for row in result["rows"])  # fmt: skip
    assert "shards of 0.2 MB" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(result["rows"])


def test_a_text_without_documents_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("no end" * 100)
    with pytest.raises(ValueError, match="documents ended by lines"):
        next(bench.bench_tokenizer(text=str(tmp_path / "text.txt"), unseen=0.0001))
