"""Triton on a CPU: what the repair computes, what the checker catches, what compiles for no card.

Where kernels are compiled in this process (on a GPU), the tests of the interpreter run in another.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apart import python

from nanolm.interpret import (
    SHARED,
    MemoryFault,
    checked,
    compile_only,
    has_triton,
    intact,
    interpreting,
    poisoned,
    repair_bfloat16,
    resources,
    tl,
    triton,
)

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
with_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
interpreted = pytest.mark.skipif(not interpreting(), reason="kernels are compiled here")
on_gpu = pytest.mark.skipif(
    interpreting() or not (has_triton() and torch.cuda.is_available()), reason="no GPU in use"
)


@with_triton
@pytest.mark.skipif(interpreting(), reason="the other tests run in this very process")
def test_the_interpreter_in_a_process_of_its_own():
    run = [sys.executable, "-m", "pytest", "-q", "-k", "not compiles", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


# ---- bfloat16 ----------------------------------------------------------------------------------

CONSTANT = tl.constexpr(3.0)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty))


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "lt":
        out = (x < y).to(tl.bfloat16)
    elif OP == "eq":
        out = (x == y).to(tl.bfloat16)
    elif OP == "where":
        out = tl.where(x > y, x, y)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "constant":
        out = x * CONSTANT + 1.0
    tl.store(out_ptr + i, out)


@triton.jit
def scale_kernel(x_ptr, out_ptr, a, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * a * a)


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, all_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i = tl.arange(0, ROWS)
    x = tl.load(x_ptr + i[:, None] * COLS + tl.arange(0, COLS)[None, :])
    tl.store(sum_ptr + i, tl.sum(x, axis=1))
    tl.store(max_ptr + i, tl.max(x, axis=1))
    tl.store(all_ptr, tl.sum(x))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, D: tl.constexpr):
    i = tl.arange(0, N)
    d = tl.arange(0, D)
    x = tl.load(x_ptr + i[:, None] * D + d[None, :])
    y = tl.load(y_ptr + i[:, None] * D + d[None, :])
    out = tl.dot(x, tl.trans(y))
    tl.store(out_ptr + i[:, None] * N + i[None, :], out.to(out_ptr.dtype.element_ty))


def patterns(dtype, n, seed=0):
    """Numbers of every kind: random bits (NaN, inf and subnormal among them) and plain ones."""
    generator = torch.Generator().manual_seed(seed)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (n // 2,), dtype=integer, generator=generator)
    if not dtype.is_floating_point:
        return torch.cat([bits, torch.arange(-(n // 4), n // 4).to(dtype)])
    return torch.cat([bits.view(dtype), torch.randn(n // 2, generator=generator).to(dtype)])


def same(ours, theirs):
    """Equal to the last bit, a NaN standing for any NaN."""
    assert ours.dtype == theirs.dtype
    number = ~theirs.isnan()
    assert torch.equal(ours.isnan(), theirs.isnan())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.dtype.itemsize]
    assert torch.equal(ours[number].view(integer), theirs[number].view(integer))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32, BF16])
def test_casts_to_bfloat16_round_as_pytorch_does(dtype):
    repair_bfloat16()
    x, out = patterns(dtype, 2**14), torch.empty(2**14, dtype=BF16)
    cast_kernel[(1,)](x, out, BLOCK=2**14)
    same(out, x.to(BF16))


@interpreted
def test_casts_of_ties_and_the_ends_of_the_range():
    repair_bfloat16()
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for lower in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x, out = ((upper << 16) | lower).view(torch.float32), torch.empty(2**16, dtype=BF16)
        cast_kernel[(1,)](x, out, BLOCK=2**16)
        same(out, x.bfloat16())


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_casts_from_bfloat16(dtype):
    repair_bfloat16()
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)  # each of them
    out = torch.empty(2**16, dtype=dtype)
    cast_kernel[(1,)](x, out, BLOCK=2**16)
    same(out, x.to(dtype))


@interpreted
def test_casts_from_bfloat16_to_integers():
    repair_bfloat16()
    x = torch.linspace(-300, 300, 1024).bfloat16()
    out = torch.empty(1024, dtype=torch.int32)
    cast_kernel[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out, x.to(torch.int32))


OPERATIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: (x.float() / y.float()).bfloat16(),
    "maximum": torch.maximum,
    "lt": lambda x, y: (x < y).bfloat16(),
    "eq": lambda x, y: (x == y).bfloat16(),
    "where": lambda x, y: torch.where(x > y, x, y),
    "neg": lambda x, y: 0 - x,
    "abs": lambda x, y: x.abs(),
    "constant": lambda x, y: x * 3.0 + 1.0,
}


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic_on_bfloat16_is_pytorchs(name):
    repair_bfloat16()
    n = 2**14
    x, y, out = patterns(BF16, n), patterns(BF16, n, seed=1).flip(0), torch.empty(n, dtype=BF16)
    special = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
    pairs = torch.cartesian_prod(special, special).bfloat16()
    x[:64], y[:64] = pairs.T
    if name == "maximum":  # with a NaN: the other on a GPU and from Triton 3.9 on, NaN before
        x, y = x.nan_to_num(1.0), y.nan_to_num(1.0)
    binary_kernel[(1,)](x, y, out, OP=name, BLOCK=n)
    want = OPERATIONS[name](x, y)
    if name in ("maximum", "neg"):  # the sign of a zero is nobody's promise
        out, want = out + 0.0, want + 0.0
    same(out, want)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_float_argument_is_a_float32_as_when_compiled(dtype):
    repair_bfloat16()
    x, out = torch.randn(1024).to(dtype), torch.empty(1024, dtype=dtype)
    scale_kernel[(1,)](x, out, 1.1, BLOCK=1024)
    a = torch.tensor(1.1)  # float32
    same(out, (x.float() * a * a).to(dtype))


@interpreted
def test_reductions_and_products_of_bfloat16():
    repair_bfloat16()
    x = torch.randint(-8, 8, (32, 64)).bfloat16()  # whole numbers: every order gives the same sum
    sums, most, everything = (torch.empty(n, dtype=BF16) for n in (32, 32, 1))
    reduce_kernel[(1,)](x, sums, most, everything, ROWS=32, COLS=64)
    same(sums, x.sum(1))
    same(most, x.max(1).values)
    same(everything[0], x.sum())
    y = torch.randint(-8, 8, (32, 64)).bfloat16()
    for dtype in (torch.float32, BF16):
        out = torch.empty(32, 32, dtype=dtype)
        dot_kernel[(1,)](x, y, out, N=32, D=64)
        same(out, (x.float() @ y.float().T).to(dtype))


@triton.jit
def loop_kernel(x_ptr, out_ptr, n):
    total = tl.load(x_ptr) * 0.0
    for i in range(n):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr, total)


@interpreted
def test_a_loop_may_have_a_bound_of_run_time():
    repair_bfloat16()
    x, out = torch.arange(10.0), torch.empty(1)
    with checked():
        loop_kernel[(1,)](x, out, 10)
    assert out.item() == 45


@interpreted
def test_a_sum_of_bfloat16_is_rounded_once():
    repair_bfloat16()
    x = torch.ones(1, 1024, dtype=BF16)  # by steps of bfloat16 one does not get past 256
    sums, most, everything = (torch.empty(1, dtype=BF16) for _ in range(3))
    reduce_kernel[(1,)](x, sums, most, everything, ROWS=1, COLS=1024)
    assert sums.item() == everything.item() == 1024 and most.item() == 1


@interpreted
def test_the_repair_is_needed_and_is_done_once():
    said = python("""
        import torch
        from nanolm.interpret import repair_bfloat16
        from test_interpret import binary_kernel, cast_kernel, dot_kernel
        one, out = torch.ones(16, 16).bfloat16(), torch.zeros(16, 16).bfloat16()
        third, rounded = torch.full((16,), 2 / 3), torch.zeros(16).bfloat16()
        for repairs in range(3):
            binary_kernel[(1,)](one, one, out, OP="add", BLOCK=256)
            cast_kernel[(1,)](third, rounded, BLOCK=16)
            product = torch.zeros(16, 16)
            dot_kernel[(1,)](one, one, product, N=16, D=16)
            right = [out[0, 0] == 2, torch.equal(rounded, third.bfloat16()), product[0, 0] == 16]
            print(*map(int, right))
            repair_bfloat16()
    """)
    assert said.splitlines() == ["0 0 0", "1 1 1", "1 1 1"]


# ---- the checker -------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def unmasked_load_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)  # BUG
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def unmasked_store_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x)  # BUG


@triton.jit
def off_by_one_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i <= n)  # BUG
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def before_the_start_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i - 1, mask=i < n)  # BUG
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def far_away_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + 2000000000, mask=i < n)  # BUG
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def wrong_type_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    halves = x_ptr.to(tl.pointer_type(tl.float16))
    x = tl.load(halves + i, mask=i < n)  # BUG
    tl.store(out_ptr + i, x, mask=i < n)


@triton.jit
def helper(x_ptr, i, n):
    x = tl.load(x_ptr + i, mask=i < n + 1)  # BUG
    return x


@triton.jit
def in_a_helper_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, helper(x_ptr, i, n), mask=i < n)


@triton.jit
def stray_atomic_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.atomic_add(out_ptr + i, x)  # BUG


@triton.jit
def everybody_writes_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x, mask=i < n)  # BUG


@triton.jit
def reads_a_neighbours_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    if tl.program_id(0) > 0:
        before = tl.load(out_ptr + i - BLOCK, mask=i < n)  # BUG
        tl.store(out_ptr + i, before, mask=i < n)


@triton.jit
def overwrites_what_others_read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x_ptr)  # all programs read this, the last one too
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr, first + 1.0)  # BUG
    tl.store(out_ptr + i, first, mask=i < n)


@triton.jit
def overflow_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = i * 100000000  # BUG
    tl.store(out_ptr + i, tl.load(x_ptr + j * 0, mask=i < n), mask=i < n)


@triton.jit
def assertion_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.device_assert(i < n, "beyond the end")  # BUG
    tl.store(out_ptr + i, i, mask=i < n)


PLANTED = [
    (unmasked_load_kernel, "out of bounds", "28 of 32 lanes outside x_ptr"),
    (unmasked_store_kernel, "out of bounds", "28 of 32 lanes outside out_ptr"),
    (off_by_one_kernel, "out of bounds", "1 of 5 lanes outside x_ptr"),
    (before_the_start_kernel, "out of bounds", "1 of 32 lanes outside"),
    (far_away_kernel, "out of bounds", "32 of 32 lanes outside"),
    (wrong_type_kernel, "out of bounds", "16 of 32 lanes outside x_ptr"),
    (in_a_helper_kernel, "out of bounds", "in helper"),
    (stray_atomic_kernel, "out of bounds", "store by program (3, 0, 0)"),
    (everybody_writes_kernel, "race", "store by program (1, 0, 0)"),
    (reads_a_neighbours_kernel, "race", "load by program (1, 0, 0)"),
    (overwrites_what_others_read_kernel, "race", "several programs"),
    (overflow_kernel, "failed assertion", "int32 overflow"),
    (assertion_kernel, "failed assertion", "beyond the end"),
]


def copy(kernel, n=100, block=32):
    (x, _), (out, around) = poisoned((n,), torch.randn(n), pad=block), poisoned((n,), pad=block)
    kernel[(-(-n // block),)](x, out, n, BLOCK=block)
    return x, out, around


@interpreted
@pytest.mark.parametrize("kernel, kind, words", PLANTED, ids=lambda p: getattr(p, "__name__", ""))
def test_a_planted_bug_is_caught_at_its_line(kernel, kind, words):
    with checked(), pytest.raises(MemoryFault) as caught:
        copy(kernel)
    fault = caught.value
    assert fault.kind == kind and words in str(fault)
    assert fault.source.endswith("# BUG") and fault.source in Path(__file__).read_text()
    line = Path(__file__).read_text().splitlines()[fault.lineno - 1]
    assert line.strip() == fault.source and f"test_interpret.py:{fault.lineno} in " in str(fault)


@interpreted
def test_a_fault_leaves_the_checker_too():
    with pytest.raises(MemoryFault), checked():
        copy(off_by_one_kernel)


@interpreted
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_a_correct_kernel_passes(n):
    with checked() as checker:
        x, out, around = copy(copy_kernel, n)
    assert torch.equal(x, out) and intact(out, around)
    writers = {m.names: m for m in checker.launch.memories}["out_ptr"]
    assert writers.writer[writers.inside].tolist() == [i // 32 for i in range(n)]
    assert (writers.writer[~writers.inside] == -1).all()


@interpreted
def test_what_is_unusual_and_allowed():
    x = torch.randn(100)
    halves = torch.randn(200)
    with checked():
        copy_kernel[(4,)](x, x, 100, BLOCK=32)  # in place, each program its own
        copy_kernel[(4,)](halves[:100], halves[100:], 100, BLOCK=32)  # two views, one memory
        copy_kernel[(4,)](x_ptr=x, out_ptr=torch.empty(100), n=100, BLOCK=32)
        copy_kernel[(1,)](torch.empty(0), torch.empty(0), 0, BLOCK=32)
        cast_kernel[(1,)](torch.ones(1).expand(1), torch.empty(1), BLOCK=1)
        for kernel in (stray_atomic_kernel, everybody_writes_kernel):
            kernel[(1,)](torch.ones(32), torch.zeros(32), 32, BLOCK=32)
    assert torch.equal(halves[:100], halves[100:])


@triton.jit
def gather_kernel(x_ptr, out_ptr, stride_h, stride_t, T, BLOCK: tl.constexpr):
    t = tl.arange(0, BLOCK)
    row = x_ptr + tl.program_id(0) * stride_h
    tl.store(out_ptr + tl.program_id(0) * BLOCK + t, tl.load(row + t * stride_t, mask=t < T))


@interpreted
def test_the_row_after_a_head_is_no_row_of_the_view():
    x, _ = poisoned((2, 3, 20, 4), torch.randn(2, 3, 20, 4), pad=4)
    heads = x[1, :, :, 2]  # (3, 20), strided
    out = torch.empty(3, 32)
    with checked():
        gather_kernel[(3,)](heads, out, *heads.stride(), 20, BLOCK=32)
        assert torch.equal(out[:, :20], heads)
        with pytest.raises(MemoryFault, match="1 of 21 lanes outside x_ptr"):
            gather_kernel[(3,)](heads, out, *heads.stride(), 21, BLOCK=32)
        wide = torch.randn(20).expand(3, 20)  # a head that is read three times
        gather_kernel[(3,)](wide, out, *wide.stride(), 20, BLOCK=32)


@interpreted
def test_nothing_is_checked_afterwards():
    from triton.runtime import interpreter as inner

    def state():
        names = ("create_masked_load", "create_masked_store", "create_assert", "create_atomic_cas")
        methods = [getattr(inner.InterpreterBuilder, name) for name in names]
        running = inner.GridExecutor.__call__, inner.GridExecutor._init_args_hst
        return [*methods, *running, inner.interpreter_builder.options]

    before = state()
    with contextlib.suppress(MemoryFault), checked():
        copy(everybody_writes_kernel)
    assert state() == before
    copy(everybody_writes_kernel)  # nobody minds


@triton.jit
def broken_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr).no_such_attribute)


@interpreted
def test_other_errors_stay_what_they_are():
    from triton.runtime.errors import InterpreterError

    with checked(), pytest.raises(InterpreterError, match="no_such_attribute"):
        copy(broken_kernel)


# ---- poison ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 3), (2, 3, 5, 4)])
def test_poison_shows_every_write(shape, dtype, device):
    data = torch.randint(-9, 9, shape)
    view, whole = poisoned(shape, data, pad=2, dtype=dtype, device=device)
    assert view.shape == shape and torch.equal(view.cpu(), data.to(dtype)) and intact(view, whole)
    rows = max(len(shape) - 2, 0)
    assert whole.size(rows) == shape[rows] + 4 and view.dtype == dtype
    view.zero_()
    assert intact(view, whole)
    for place in (0, 1, -2, -1):
        before = whole.clone()
        whole.select(rows, place).zero_()
        assert not intact(view, whole)
        whole.copy_(before)
    assert intact(view, whole)


def test_a_view_without_data_is_poison_itself():
    assert poisoned((2, 3))[0].isnan().all()
    assert (poisoned((2, 3), dtype=torch.int32)[0] == torch.iinfo(torch.int32).min).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_over_poison_is_seen(dtype):
    """What a kernel makes of the poison that it read is NaN too."""
    for data in (None, torch.ones(2, 3, dtype=dtype)):
        view, whole = poisoned((2, 3), data, pad=2, dtype=dtype)
        assert intact(view, whole)
        view[:] = float("nan")
        assert intact(view, whole)
        if data is None:  # around inputs, plain NaN: that is what a kernel would read
            read = poisoned((2, 3), torch.ones(2, 3, dtype=dtype), pad=2)[1]
            whole[-1] = read[-1] + read[-1]
            assert not intact(view, whole)


def test_poison_takes_after_the_data():
    data = torch.arange(6, dtype=torch.int64).reshape(2, 3) + 2**40
    view, whole = poisoned((2, 3), data)
    assert view.dtype == torch.int64 and torch.equal(view, data) and intact(view, whole)
    for shape, given, pad in (((3, 2), data, 1), ((), None, 1), ((2, 3), None, 0)):
        with pytest.raises(ValueError, match="rows around a view"):
            poisoned(shape, given, pad)


@interpreted
def test_poison_shows_what_a_kernel_read_or_wrote():
    x, out, around = copy(unmasked_store_kernel)
    assert torch.equal(x, out) and not intact(out, around)
    x, whole = poisoned((3, 100, 1), torch.randn(3, 100, 1), pad=30)
    out = torch.empty(3, 128)
    gather_kernel[(3,)](x, out, x.stride(0), 1, 101, BLOCK=128)
    assert out[:, 100].isnan().all() and not out[:, :100].isnan().any() and intact(x, whole)


# ---- compiling for a card that is not there ----------------------------------------------------


@triton.jit
def scores_kernel(q_ptr, k_ptr, out_ptr, T, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + i[:, None] * D + d[None, :], mask=i[:, None] < T, other=0.0)
    k = tl.load(k_ptr + j[:, None] * D + d[None, :], mask=j[:, None] < T, other=0.0)
    s = tl.dot(q, tl.trans(k)) * CONSTANT
    tl.store(out_ptr + i[:, None] * T + j[None, :], s, mask=(i[:, None] < T) & (j[None, :] < T))


def scores(q, k, block=64):
    """Host code as a library has it: no word about compiling only."""
    T, D = q.shape
    out = torch.empty(T, T, device=q.device)
    grid = (triton.cdiv(T, block), triton.cdiv(T, block))
    scores_kernel[grid](q, k, out, T, D=D, BLOCK=block, num_warps=8)
    return out


def both_launches(device="meta"):
    q = torch.ones(100, 64, dtype=BF16, device=device)
    copy_kernel[(4,)](q, torch.empty_like(q), 100, BLOCK=32)
    return scores(q, q)


@with_triton
@pytest.mark.parametrize("capability", sorted(SHARED))
def test_compiles_for_a_card_that_is_not_there(capability):
    said = python(
        f"""
        from nanolm.interpret import *
        from test_interpret import *
        with compile_only({capability}) as compiled:
            both_launches()
            both_launches()
        names = [name for name, _ in compiled]
        assert names == ["copy_kernel", "scores_kernel"] * 2, names
        plain, product = [resources(kernel) for _, kernel in compiled[:2]]
        assert not interpreting() and plain["tensor_cores"] == 0 < product["tensor_cores"]
        assert plain["stack"] == product["stack"] == 0 < plain["registers"] <= 255
        assert 16384 <= product["shared"] <= SHARED[{capability}] * 1024
        assert compiled[1][1].metadata.target.arch == {capability}
        with compile_only({capability}) as compiled:
            scores(*[torch.empty(100, 64, dtype=torch.bfloat16, device="meta")] * 2, block=256)
        assert resources(compiled[0][1])["stack"] > 0
        print("well")
        """,
        TRITON_INTERPRET="0",
    )
    assert said == "well\n"


@with_triton
def test_compiles_for_one_card_after_another():
    said = python(
        """
        from test_interpret import *
        for capability in (80, 90, 80):
            with compile_only(capability) as compiled:
                both_launches()
            print(compiled[1][1].metadata.target.arch, len(scores_kernel.device_caches))
        from triton.runtime.driver import driver
        print(driver._active)
        """,
        TRITON_INTERPRET="0",
    )
    assert said.splitlines() == ["80 0", "90 0", "80 0", "None"]


@with_triton
def test_another_card_is_refused():
    said = python(
        """
        from test_interpret import *
        for capability in (9, 85, "90"):
            try:
                compile_only(capability).__enter__()
            except ValueError as error:
                print(error)
        """,
        TRITON_INTERPRET="0",
    )
    assert said.count("is none of 80, 86, 89, 90 (times ten)") == 3


@with_triton
def test_compiles_float_arguments_as_float32_and_products_as_tf32():
    """What the repair and the book say of the compiler."""
    said = python(
        """
        from test_interpret import *
        x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        y = torch.empty(64, 64, device="meta")
        with compile_only(80) as compiled:
            scale_kernel[(1,)](x, x, 1.5, BLOCK=64)
            dot_kernel[(1,)](y, y, y, N=64, D=64)
        first, second = [kernel.asm["ttir"] for _, kernel in compiled]
        print(first.count("arith.mulf"), "mulf %" in first and "xf32>" in first)
        print("tf32" in second, "TF32" in compiled[1][1].asm["sass"])
        """,
        TRITON_INTERPRET="0",
    )
    assert said.splitlines() == ["2 True", "True True"]


SLOPE = 0.5


@triton.jit
def plain_global_kernel(x_ptr):
    tl.store(x_ptr, SLOPE)


@triton.jit
def one_branch_kernel(x_ptr):
    if tl.load(x_ptr) == 0.0:
        x = tl.load(x_ptr) + 1.0
    tl.store(x_ptr, x)


@triton.jit
def break_kernel(x_ptr):
    for i in range(3):
        if i == 1:
            break
        tl.store(x_ptr + i, 1.0)


@triton.jit
def dictionary_kernel(x_ptr):
    table = {"one": 1.0}
    tl.store(x_ptr, table["one"])


ODD = {
    "plain global": plain_global_kernel,
    "one branch": one_branch_kernel,
    "break": break_kernel,
    "dictionary": dictionary_kernel,
}


def refused(launch):
    """Whether the Triton of this process refuses a launch, for whatever reason."""
    try:
        with contextlib.nullcontext() if interpreting() else compile_only(80):
            launch()
    except Exception:
        return True
    return False


def refusals():
    def zeros(*shape):
        return torch.zeros(*shape, device="cpu" if interpreting() else "meta")

    launches = {name: lambda kernel=kernel: kernel[(1,)](zeros(16)) for name, kernel in ODD.items()}
    launches["narrow product"] = lambda: dot_kernel[(1,)](
        zeros(16, 4), zeros(16, 4), zeros(16, 16), N=16, D=4
    )
    launches["misspelt option"] = lambda: copy_kernel[(1,)](
        zeros(16), zeros(16), 16, BLOCK=16, num_wraps=8
    )
    return [name for name, launch in launches.items() if refused(launch)]


@interpreted
def test_what_the_interpreter_accepts():
    assert refusals() == []


@with_triton
def test_compiles_less_than_the_interpreter_accepts():
    script = "from test_interpret import *; print(refusals())"
    said = python(script, TRITON_INTERPRET="0")
    assert said == f"{[*ODD, 'narrow product', 'misspelt option']}\n"


@interpreted
def test_compile_only_needs_a_process_that_compiles():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0") as caught, compile_only(80):
        pass
    assert "\n" not in str(caught.value)


@with_triton
def test_checked_needs_a_process_that_interprets():
    script = """
        from test_interpret import *
        repair_bfloat16()
        try:
            with checked():
                pass
        except RuntimeError as error:
            print(error)
    """
    assert "TRITON_INTERPRET=1" in python(script, TRITON_INTERPRET="0")


@on_gpu
def test_the_same_kernels_on_a_gpu():
    def right():
        return torch.equal(both_launches("cuda").cpu(), torch.full((100, 100), 192.0))

    assert right()
    with compile_only(80) as compiled:
        both_launches()
    assert len(compiled) == 2 and resources(compiled[1][1])["tensor_cores"] > 0
    assert right()  # the cache holds nothing for the other card
    for kernel, clean in ((copy_kernel, True), (unmasked_store_kernel, False)):
        x, _ = poisoned((100,), torch.randn(100), pad=32, device="cuda")
        out, around = poisoned((100,), pad=32, device="cuda")
        kernel[(4,)](x, out, 100, BLOCK=32)
        assert torch.equal(x, out) and intact(out, around) == clean


# ---- without Triton ----------------------------------------------------------------------------


def test_a_module_with_kernels_can_be_imported_without_triton():
    said = python("""
        import sys
        sys.modules["triton"] = None
        from nanolm.interpret import checked, compile_only, has_triton, interpreting, poisoned
        from nanolm.interpret import repair_bfloat16, tl, triton
        import test_interpret  # with all its kernels, decorators and constants

        @triton.autotune(configs=[triton.Config({"BLOCK": 16})], key=["n"])
        @triton.heuristics({"dtype": lambda arguments: tl.float32})
        @triton.jit(debug=True)
        def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr, dtype: tl.constexpr = tl.float32):
            pass

        assert not has_triton() and not interpreting() and poisoned((3, 4))[0].shape == (3, 4)
        repair_bfloat16()
        launches = [
            lambda: test_interpret.copy(test_interpret.copy_kernel),
            lambda: tuned_kernel[lambda meta: (1,)](None, 3),
            lambda: test_interpret.helper(1, 2, 3),
            lambda: triton.cdiv(3, 2),
            lambda: compile_only(80).__enter__(),
            lambda: checked().__enter__(),
        ]
        for launch in launches:
            try:
                launch()
            except (ImportError, RuntimeError) as error:
                print(type(error).__name__, error)
    """)
    names = ["copy_kernel", "tuned_kernel", "helper", "triton.cdiv"]
    lines = said.splitlines()
    assert len(lines) == 6
    for name, line in zip(names, lines, strict=False):
        assert line.startswith(f"ImportError {name} needs Triton, which is not installed")
    assert all(line.startswith("RuntimeError") for line in lines[4:])


@with_triton
def test_importing_does_no_work():
    said = python(
        """
        import nanolm.interpret
        from triton.runtime.interpreter import InterpreterBuilder as builder
        print("bfloat16_is_repaired" in vars(builder), builder.binary_op.__module__)
        """,
        TRITON_INTERPRET="1",
    )
    assert said == "False triton.runtime.interpreter\n"
