"""Flash attention against the formula in float64, at lengths and layouts that nobody tries first.

Without a GPU the kernels are interpreted, and the checker looks at every address. On a GPU the same
tests run them for real, over the full grid. Poison surrounds all that they read and write in both.
"""

import contextlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import flash_gate
import pytest
import torch
from alive import Alive
from apart import NO_TRITON, compiled_rows, python
from place import DEVICE, ON_GPU, RUNS, on_gpu, with_kernels
from seeded import one_seed  # noqa: F401

from nanolm import flash
from nanolm.flash import (
    HOPPER,
    OTHERS,
    Tiles,
    flash_attention,
    launch_backward,
    launch_forward,
    tiled_backward,
    tiled_forward,
)
from nanolm.interpret import SHARED, checked, has_triton, intact, interpreting, poisoned
from nanolm.model import apply_rotary, attention, rotary_tables

ROOT = Path(__file__).resolve().parent.parent
# infinite scores are meant here; NumPy, which interprets, finds them worth a word
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES = (BF16, FP16)
LENGTHS = (1, 7, 63, 64, 65, 97, 127, 128, 129)
LONG_LENGTHS = (512, 1000, 1025)
PAD = 128  # rows of poison: as many as a tile can reach too far
ROUNDING = 3e-7  # of float32 products in another order
NOTHING = 1e-4  # what is left where the right answer is zero


def test_where_triton_is_kernels_run():
    """Else nearly all that follows would be skipped, and nobody would notice."""
    assert RUNS or not has_triton()


def label(value):
    """A short name for a parameter of a test."""
    if isinstance(value, Tiles):
        return "x".join(map(str, value[:2])) + "box" * value.BOX
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


# ---- the judge, and what is judged -------------------------------------------------------------


class Results(NamedTuple):
    """What attention gives: the output, three gradients, and the log-sum-exp to base 2."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    lse: torch.Tensor


def formula(q, k, v, grad, causal, scale):
    """All results by the formula, every step in the type of the inputs."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    T, S, group = q.size(2), k.size(2), q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if causal:
        key, query = torch.arange(S, device=q.device), torch.arange(T, device=q.device)
        scores = scores.masked_fill(key > query[:, None] + (S - T), -math.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    wide = torch.promote_types(q.dtype, FP32)
    lse = scores.detach().to(wide).logsumexp(-1) / math.log(2)
    return Results(out.detach(), *torch.autograd.grad(out, (q, k, v), grad), lse)


def assert_accurate(found, given, causal, scale, slack=0.0):
    """Our error against float64 is at most twice that of the formula in the inputs' own type.

    `slack` is more of it that is allowed, as a part of the right answer's norm.
    """
    right = formula(*(x.double() for x in given), causal, scale)
    plain = formula(*given, causal, scale)
    for name, ours, theirs, exact in zip(Results._fields, found, plain, right, strict=True):
        error, allowed = ((x.double() - exact).norm().item() for x in (ours, theirs))
        size = exact.norm().item()
        allowed = 2 * allowed + ((ROUNDING + slack) * size if size > 1e-9 else NOTHING)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} of {size:.3g}"


def some(T, S=None, group=1, D=32, dtype=FP32, heads=1, B=1):
    """Queries, keys, values and a gradient of the output, drawn on the CPU: everywhere the same."""
    q_size, k_size = (B, group * heads, T, D), (B, heads, S or T, D)
    return [torch.randn(size).to(DEVICE, dtype) for size in (q_size, k_size, k_size, q_size)]


class Walls:
    """Stands in for what makes room for results: with poison all around, and within."""

    def __init__(self):
        self.rooms = []

    def room(self, whole_size, like, dtype, dim, pad, length):
        whole = torch.full(whole_size, math.nan, dtype=dtype, device=like.device)
        view = whole.narrow(dim, pad, length)
        self.rooms.append((view, whole))
        return view

    def new_outputs(self, q):
        B, H, T, D = q.shape
        out = self.room((B, T + 2 * PAD, H, D), q, q.dtype, 1, PAD, T).transpose(1, 2)
        whole = 2 * PAD + (T + 3) // 4 * 4
        return out, self.room((B, H, whole), q, FP32, 2, PAD, T)

    def empty_like(self, x, **options):
        B, H, T, D = x.shape
        return self.room((B, H, T + 2 * PAD, D), x, x.dtype, 2, PAD, T)


@contextlib.contextmanager
def watched():
    """Walls around all that is written meanwhile, and the checker where kernels are interpreted."""
    walls = Walls()
    with (
        mock.patch.object(flash, "new_outputs", walls.new_outputs),
        mock.patch.object(torch, "empty_like", walls.empty_like),
        checked() if interpreting() else contextlib.nullcontext(),
    ):
        yield
    assert len(walls.rooms) == 7  # output and log-sum-exp, unused and delta, three gradients
    assert all(intact(view, whole) for view, whole in walls.rooms), "written where nothing is"


def by_kernels(given, causal, scale, forward=None, dq=None, dkdv=None):
    """All results by the kernels, with such tiles, from inputs that lie in poison."""
    q, k, v, grad = (poisoned(x.shape, x, PAD, x.dtype, DEVICE)[0] for x in given)
    with watched():
        out, lse = launch_forward(q, k, v, causal, scale, forward)
        gradients = launch_backward(grad, q, k, v, out, lse, causal, scale, dq, dkdv)
    return Results(out, *gradients, lse)


def poison_around(tensors):
    return [poisoned(x.shape, x, PAD, x.dtype, DEVICE)[0] for x in tensors]


def unguarded(given, causal=True, scale=0.2, tiles=None):
    """All results by the kernels, from these very tensors."""
    *inputs, grad = given
    out, lse = launch_forward(*inputs, causal, scale, tiles)
    gradients = launch_backward(grad, *inputs, out, lse, causal, scale, tiles, tiles)
    return Results(out, *gradients, lse)


def assert_same_bits(one, two):
    for name, a, b in zip(Results._fields, one, two, strict=True):
        assert torch.equal(a, b), name


# ---- lengths, groups, types, tiles -------------------------------------------------------------

KINDS = [(BF16, 64), (FP32, 32), (FP16, 128 if ON_GPU else 16)]  # types, channels of a head


def length_cases():
    """(T, causal, group, dtype, D): on a GPU all, elsewhere the kinds in turn and few long ones."""
    shapes = [*itertools.product(LENGTHS, (True, False), (1, 2, 4, 8))]
    if ON_GPU:
        shapes = itertools.product(LENGTHS + LONG_LENGTHS, (True, False), (1, 2, 4, 8))
        return [(*shape, *kind) for shape in shapes for kind in KINDS]
    shapes += [(512, True, 8), (512, False, 2), (1000, True, 4), (1000, False, 1)]
    shapes += [(1025, True, 2), (1025, False, 1)]
    return [(*shape, *KINDS[i % len(KINDS)]) for i, shape in enumerate(shapes)]


@with_kernels
@pytest.mark.parametrize("T, causal, group, dtype, D", length_cases(), ids=label)
def test_every_length(T, causal, group, dtype, D):
    given = some(T, group=group, D=D, dtype=dtype)
    tiles = None  # those that the kernels choose
    if interpreting() and T > 65:  # larger ones: fewer steps to interpret
        tiles = Tiles(128, 128, 8, 2) if T > 256 else Tiles(64, 64, 4, 2)
    found = by_kernels(given, causal, D**-0.5, tiles, tiles, tiles)
    assert_accurate(found, given, causal, D**-0.5)


SHAPES = [  # queries, keys, mask
    (1, 40, True), (30, 97, True), (33, 33, True), (64, 128, True), (65, 66, True),
    (97, 30, False), (5, 90, False), (90, 5, False), (1, 1, False), (48, 48, False),
]  # fmt: skip
SMALL_TILES = [Tiles(32, 16, 4, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2)]
GROUPS = [1, 2, 3, 4, 8, 16]


def tile_cases():
    for i, (shape, box) in enumerate(itertools.product(SHAPES, (False, True))):
        for dtype in (BF16, FP16, FP32) if ON_GPU else [(BF16, FP16, FP32)[i % 3]]:
            yield *shape, GROUPS[i * 5 % 6], SMALL_TILES[i % 3]._replace(BOX=box), dtype


@with_kernels
@pytest.mark.parametrize("T, S, causal, group, tiles, dtype", [*tile_cases()], ids=label)
def test_small_tiles_by_pointers_and_by_descriptors(T, S, causal, group, tiles, dtype):
    given = some(T, S, group, D=16, dtype=dtype, heads=2 if group < 8 else 1, B=2)
    found = by_kernels(given, causal, 0.25, tiles, tiles, tiles)
    assert_accurate(found, given, causal, 0.25)


@with_kernels
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("box", [False, True])
def test_each_head_reads_its_own_keys(group, box):
    given = some(20, 35, group, D=16, heads=2, B=2)
    tiles = Tiles(64, 16, 4, 2, box)
    assert_accurate(by_kernels(given, True, 0.25, tiles, tiles, tiles), given, True, 0.25)


def table_cases():
    for table, entries in (("hopper", HOPPER), ("others", OTHERS)):
        for (kernel, width, *_), tiles in entries.items():
            for D in (16, 32) if width == 32 else (width,):
                yield table, kernel, D, tiles


@with_kernels
@pytest.mark.parametrize("table, kernel, D, tiles", [*table_cases()], ids=label)
def test_every_tile_that_ships(table, kernel, D, tiles):
    if ON_GPU and table == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these tiles are for another card")
    given = some(83, group=4, D=D, dtype=BF16)
    found = by_kernels(given, True, D**-0.5, **{kernel: tiles})
    assert_accurate(found, given, True, D**-0.5)


def test_the_tables_have_tiles_for_every_width_and_kernel():
    for kernel, D in itertools.product(("forward", "dq", "dkdv"), (32, 64, 128)):
        assert (kernel, D) in OTHERS and (kernel, D, False) in HOPPER


@with_kernels
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=label)
@pytest.mark.parametrize("box", [False, True])
def test_the_same_bits_every_time(dtype, box):
    B, heads, T = (16, 8, 1025) if ON_GPU else (1, 2, 40)
    given = some(T, group=4, D=64 if ON_GPU else 16, dtype=dtype, heads=heads, B=B)
    tiles = Tiles(32, 32, 4, 2, box)
    first = unguarded(given, tiles=tiles)
    for _ in range(20 if ON_GPU else 1):
        assert_same_bits(first, unguarded(given, tiles=tiles))


# ---- layouts -----------------------------------------------------------------------------------


def heads_beside(x):
    """The same numbers, stored as (B, T, H * D): as a linear layer gives them."""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D).view(B, T, H, D).transpose(1, 2)


def misaligned(x):
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


def cached(x):
    """The first part of a longer cache."""
    B, H, T, D = x.shape
    return x.new_full((B, H, 2 * T + 5, D), math.nan)[:, :, :T].copy_(x)


def part_of_channels(x):
    """Every other part of a projection that makes queries, keys and values at once."""
    return torch.cat([x, x * math.nan], -1)[..., : x.size(-1)]


def odd_rows(x):
    """Rows that begin at odd places: no 16 bytes of them can be fetched at once."""
    B, H, T, D = x.shape
    return x.new_full((B, H, T, D + 1), math.nan)[..., :D].copy_(x)


def channels_apart(x):
    return x.mT.contiguous().mT


def every_other_channel(x):
    return torch.stack([x, x * math.nan], -1).flatten(-2)[..., ::2]


def repeated(x):
    return x[:, :, :1].expand(x.shape)


LAYOUTS = [heads_beside, misaligned, cached, part_of_channels, odd_rows, repeated]
LAYOUTS += [channels_apart, every_other_channel]


@with_kernels
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
def test_the_layout_of_inputs_changes_no_bit(layout, box):
    plain = [layout(x).contiguous() for x in some(21, 37, 2, D=16, dtype=FP16, heads=2, B=2)]
    laid = [layout(x) for x in plain]
    assert not laid[0].is_contiguous() or laid[0].data_ptr() % 16
    tiles = Tiles(32, 16, 4, 2, box)
    with checked() if interpreting() else contextlib.nullcontext():
        found = unguarded(laid, tiles=tiles)
    assert_same_bits(found, unguarded(plain, tiles=tiles))
    promised = flash.backward_shapes(laid[3], *laid[:3], found.out, found.lse, True, 0.2)
    for gradient, told in zip(found[1:4], promised, strict=True):
        assert gradient.stride() == told.stride()  # as compilers are told


@with_kernels
@pytest.mark.parametrize("box", [False, True])
def test_a_log_sum_exp_that_was_copied(box):
    """As hooks on saved tensors do; deltas must not be stored by its strides in other memory."""
    given, tiles = some(37, group=2, D=16, dtype=FP16), Tiles(32, 16, 4, 2, box)
    right = unguarded(given, tiles=tiles)
    for lse in (right.lse.contiguous(), torch.zeros(1, 3, 48, device=DEVICE)[:, :2, :37]):
        lse = lse.copy_(right.lse)
        with checked() if interpreting() else contextlib.nullcontext():
            found = launch_backward(given[3], *given[:3], right.out, lse, True, 0.2, tiles, tiles)
        assert all(map(torch.equal, found, right[1:4]))


@with_kernels
@pytest.mark.parametrize("T, D, heads, group", [(5, 16, 1, 1), (37, 16, 2, 4), (100, 32, 1, 2)])
@pytest.mark.parametrize("box", [False, True])
def test_gradients_turned_back_are_those_of_what_was_turned(T, D, heads, group, box):
    q, k, v, grad = some(T, D=D, heads=heads, group=group)
    tables = [x.to(DEVICE) for x in rotary_tables(T, D)]
    given = [x.double().requires_grad_() for x in (q, k)]
    out = attention(*(apply_rotary(x, *tables) for x in given), v.double(), scale=0.2)
    right = torch.autograd.grad(out, given, grad.double())
    turned, tiles = [apply_rotary(x, *tables) for x in (q, k)], Tiles(32, 16, 4, 2, box)
    with watched():
        out, lse = launch_forward(*turned, v, True, 0.2, tiles)
        given = grad, *turned, v, out, lse, True, 0.2, tiles, tiles
        dq, dk, _ = launch_backward(*given, turn=poison_around(tables))
    for found, exact in zip((dq, dk), right, strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@with_kernels
def test_tables_that_cannot_be_are_refused():
    q, k, v, grad = some(8, 12, D=16)
    out, lse = launch_forward(q, k, v, True, 0.2)
    good = [x.to(DEVICE) for x in rotary_tables(12, 16)]
    apart = [torch.stack((x, x), -1)[..., 0] for x in good]
    for keys, tables in ((12, good), (8, [x[:7] for x in good]), (8, apart)):
        given = grad, q, k[:, :, :keys], v[:, :, :keys], out, lse, True, 0.2
        with pytest.raises(ValueError, match="whole tables"):
            launch_backward(*given, turn=tables)


def test_autocast_on_a_cpu_rounds_nothing():
    q, k, v, _ = (x.cpu() for x in some(20, group=2))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flash_attention(q, k, v)
    assert torch.equal(rounded, flash_attention(q, k, v))


@with_kernels
@pytest.mark.parametrize("axis", range(3))
def test_offsets_beyond_32_bits(axis):
    """Memory that is asked for and hardly touched costs nothing."""
    size, far = (3, 3, 3, 16), 2**30 + 8
    strides = [far if i == axis else step for i, step in enumerate((288, 96, 32))]
    room = torch.empty(2 * far + 1024, dtype=FP16, device=DEVICE)

    def spread(x, start):
        return room.as_strided(size, (*strides, 1), start).copy_(x)

    given = some(3, D=16, dtype=FP16, heads=3, B=3)
    with int32_overflow_is_an_error():
        tiles = Tiles(32, 16, 4, 2)
        right = unguarded(given, tiles=tiles)
        apart = [spread(x, 16 * (i % 2)) for i, x in enumerate(given[:2])]
        out, lse = launch_forward(*apart, given[2], True, 0.2, tiles)
        assert torch.equal(out, right.out) and torch.equal(lse, right.lse)
        for i in range(4):
            found = [spread(x, 0) if i == j else x for j, x in enumerate(given)]
            assert_same_bits(unguarded(found, tiles=tiles), right)
        gradients = launch_backward(
            given[3], *given[:3], spread(out, 0), lse, True, 0.2, tiles, tiles
        )
        assert_same_bits(Results(out, *gradients, lse), right)


def int32_overflow_is_an_error():
    """On a GPU nothing is, so there the numbers must tell."""
    if not interpreting():
        return contextlib.nullcontext()
    from triton.runtime import interpreter as inner

    noticing = inner.InterpreterOptions(debug=True)
    return mock.patch.object(inner.interpreter_builder, "options", noticing)


@on_gpu
def test_a_batch_of_more_than_two_billion_numbers():
    B, H, T, D = 64, 64, 8208, 64
    assert B * H * T * D > 2**31
    q = torch.randn(B, H, T, D, device="cuda", dtype=BF16)
    k, v = (torch.randn(B, H // 16, T, D, device="cuda", dtype=BF16) for _ in range(2))
    grad = torch.randn_like(q)
    large = unguarded((q, k, v, grad))
    for b, h in ((0, 0), (31, 1), (63, 3)):
        few = slice(b, b + 1), slice(h * 16, h * 16 + 16)
        one = slice(b, b + 1), slice(h, h + 1)
        small = unguarded((q[few], k[one], v[one], grad[few]))
        there = few, few, one, one, few
        assert_same_bits([x[at] for x, at in zip(large, there, strict=True)], small)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_gpu
def test_tensors_on_a_card_that_is_not_the_current_one():
    given = [x.to("cuda:1") for x in some(100, group=4, D=64, dtype=BF16)]
    leaves = [x.requires_grad_() for x in given[:3]]
    out = flash_attention(*leaves)
    out.backward(given[3])
    right = formula(*(x.detach().double() for x in given), True, 0.125)
    assert (out.double() - right.out).abs().max() < 0.05
    assert (leaves[1].grad.double() - right.dk).abs().max() < 0.2


# ---- the guess ---------------------------------------------------------------------------------

GUESSED = Tiles(32, 32, 4, 2)
EXCESSES = [-1000, -127, 8, 14, 15, 16, 24, 60, 63, 64, 65, 127, 128, 1000]  # powers of 2
SURPRISES = [
    *itertools.product(EXCESSES, (BF16, FP16, FP32), (32,)),
    *itertools.product((24, 65, 1000), (BF16, FP16), (16, 64, 128)),
]
PLACES = {  # rows that are surprised, and by which keys
    "all": (slice(None), slice(0, 40)),
    "one row of a tile": (slice(75, 76), slice(20, 22)),
    "the last tile": (slice(None), slice(36, 40)),
}


def rounding_of(score):
    """What is lost of a weight 2 ** (score - lse): half a unit in the last place of each."""
    return 2 * abs(score) * 2.0**-24


def surprising(excess, rows, keys, dtype, D=32, T=96):
    """Inputs whose scores are small, and `excess` (base 2) more in these rows for these keys."""
    q, k, v, grad = some(T, D=D, dtype=dtype)
    q[..., 0], k[..., 0] = 0, 0
    q[:, :, rows, 0] = 1
    k[:, :, keys, 0] = excess
    return q, k, v, grad


@with_kernels
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("excess, dtype, D", SURPRISES, ids=label)
def test_a_guess_that_was_wrong_does_no_harm(excess, dtype, D, place):
    given = surprising(excess, *PLACES[place], dtype, D)
    found = by_kernels(given, True, math.log(2), GUESSED, GUESSED, GUESSED)
    assert_accurate(found, given, True, math.log(2), rounding_of(excess))


@with_kernels
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=label)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("step", [-30.0, -3.0, 3.0, 30.0])
def test_scores_that_climb_or_fall_from_tile_to_tile(dtype, causal, step):
    q, k, v, grad = given = some(96, dtype=dtype)
    q[..., 0] = 1
    k[..., 0] = step * (torch.arange(96, device=DEVICE) // 16)
    found = by_kernels(given, causal, math.log(2), GUESSED, GUESSED, GUESSED)
    assert_accurate(found, given, causal, math.log(2), rounding_of(step * 5))


LARGE = [(BF16, 60), (BF16, 100), (FP32, 60), (FP32, 100), (FP16, 12)]


@with_kernels
@pytest.mark.parametrize("dtype, excess", LARGE, ids=label)
def test_large_values_do_not_overflow_with_a_low_guess(dtype, excess):
    q, k, v, grad = surprising(excess, *PLACES["all"], dtype)
    v = v.clamp(-1, 1) * (3e4 if dtype == FP16 else 1e15)
    out, _ = launch_forward(q, k, v, True, math.log(2), GUESSED)
    right = formula(*(x.double() for x in (q, k, v, grad)), True, math.log(2)).out
    assert (out.double() - right).norm() <= 0.01 * right.norm()


BROKEN = {
    "a query": lambda q, k, v: q[:, :1, 50].fill_(math.nan),
    "a query without bounds": lambda q, k, v: q[:, :1, 50].fill_(math.inf),
    "a key": lambda q, k, v: k[:, :, 50].fill_(math.nan),
    "a key without bounds": lambda q, k, v: k[:, :, 50].fill_(math.inf),
    "a value": lambda q, k, v: v[:, :, 50].fill_(math.nan),
    "a value without bounds": lambda q, k, v: v[:, :, 50].fill_(math.inf),
}


@with_kernels
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=label)
def test_what_is_not_a_number_stays_where_it_belongs(what, causal, dtype):
    q, k, v, grad = given = some(70, group=2, dtype=dtype)
    before = formula(*given, causal, 0.2).out.double()
    BROKEN[what](q, k, v)
    out, _ = launch_forward(q, k, v, causal, 0.2, GUESSED)
    plain = formula(q, k, v, grad, causal, 0.2).out
    seen = torch.ones(70, dtype=torch.bool, device=DEVICE)
    if causal:
        seen[:50] = False  # the rows that cannot see it
    if "query" in what:
        seen = torch.arange(70, device=DEVICE) == 50
    touched = (seen & ~plain.isfinite().all(-1)).unsqueeze(-1).expand_as(out)
    assert not out[touched].isfinite().all(-1).any()
    if "value" not in what:  # 0 times NaN is NaN, also in PyTorch
        assert torch.equal(out.isfinite().all(-1), plain.isfinite().all(-1))
        assert torch.where(plain.isfinite(), out.double() - before, 0).abs().max() < 0.05


@with_kernels
@pytest.mark.parametrize("rows", [slice(None), slice(40, 41)], ids=["all", "one"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=label)
def test_scores_of_minus_infinity_are_not_seen(dtype, rows):
    q, k, v, grad = given = some(70, dtype=dtype)
    q[..., 0], k[..., 0] = 0, 0
    q[:, :, rows, 0] = 1e20
    k[:, :, 32:, 0] = -1e30  # their product is less than any number: so is the guess, for row 40
    out, lse = launch_forward(q, k, v, True, 0.2, GUESSED)
    right, plain = formula(*(x.double() for x in given), True, 0.2), formula(*given, True, 0.2)
    assert plain.out.isfinite().all()
    assert torch.allclose(out.double(), right.out, atol=2e-2 if dtype == BF16 else 1e-5)
    assert torch.allclose(lse.double(), right.lse, atol=2e-2 if dtype == BF16 else 1e-5)


# ---- plain PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, D", [(FP32, 48), (FP64, 7), (BF16, 32), (FP16, 32)], ids=label)
@pytest.mark.parametrize("T, S, causal", SHAPES)
def test_tiles_in_plain_pytorch(T, S, causal, dtype, D):
    *inputs, grad = given = some(T, S, 3, D, dtype, heads=2, B=2)
    out, lse = tiled_forward(*inputs, causal, 0.2, tile=16)
    found = Results(out, *tiled_backward(grad, *inputs, out, lse, causal, 0.2, tile=16), lse)
    assert [x.dtype for x in found[:4]] == [dtype] * 4
    assert_accurate(found, given, causal, 0.2)


def memory(T, causal=True):
    """The bytes at the worst moment of both passes over T queries and keys, and the largest."""
    *inputs, grad = some(T, group=2, D=4)
    with Alive() as alive:
        out, lse = tiled_forward(*inputs, causal, 0.2, tile=16)
        tiled_backward(grad, *inputs, out, lse, causal, 0.2, tile=16)
    return alive


def test_scores_exist_for_one_tile_of_keys_at_a_time():
    assert memory(512).largest <= 2 * 512 * 16  # heads, queries, columns of a tile


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_length_and_not_its_square(causal):
    assert memory(2048, causal).most <= 2.2 * memory(1024, causal).most


# ---- the function ------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "kernels"])
def route(request, monkeypatch):
    """By plain PyTorch, and by the kernels (where there is no GPU, interpreted)."""
    if request.param == "kernels" and not RUNS:
        pytest.skip("Triton is not installed")
    if not ON_GPU:
        monkeypatch.setattr(flash, "has_kernel", lambda q: request.param == "kernels")
    elif request.param == "plain":
        monkeypatch.setitem(globals(), "DEVICE", "cpu")
    return request.param


@pytest.mark.parametrize("T, S, causal", [(1, 1, True), (40, 40, True), (9, 33, False)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=label)
def test_flash_attention_and_its_gradients(route, T, S, causal, dtype):
    *inputs, grad = given = some(T, S, 4, dtype=dtype, heads=2, B=2)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = flash_attention(*leaves, causal=causal)
    gradients = torch.autograd.grad(out, leaves, grad)
    lse = formula(*given, causal, 32**-0.5).lse  # which the function does not give
    assert_accurate((out.detach(), *gradients, lse), given, causal, 32**-0.5)


def test_a_gradient_that_is_one_number_repeated(route):
    leaves = [x.requires_grad_() for x in some(33, group=2)[:3]]
    flash_attention(*leaves).sum().backward()
    ones = torch.ones_like(leaves[0]).double()
    right = formula(*(x.detach().double() for x in leaves), ones, True, 32**-0.5)
    for leaf, exact in zip(leaves, right[1:4], strict=True):
        assert torch.allclose(leaf.grad.double(), exact, atol=2e-5)


def test_heads_that_lie_beside_each_other(route):
    whole = torch.randn(2, 30, 3 * 64, device=DEVICE, requires_grad=True)
    q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in whole.split(64, -1))
    out = flash_attention(q, k, v).transpose(1, 2).flatten(2)
    assert out.is_contiguous()  # so the next layer copies nothing
    (found,) = torch.autograd.grad(out.square().sum(), whole)
    exact = whole.detach().double().requires_grad_()
    q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in exact.split(64, -1))
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    (gradient,) = torch.autograd.grad(right.square().sum(), exact)
    assert torch.allclose(found.double(), gradient, atol=1e-4)


def test_keys_that_are_stored_channel_by_channel(route):
    q, k, v, grad = some(40, dtype=FP32)
    leaves = [q.requires_grad_(), k.mT.contiguous().mT.requires_grad_(), v.requires_grad_()]
    gradients = torch.autograd.grad(flash_attention(*leaves), leaves, grad)
    right = formula(*(x.detach().double() for x in (q, k, v, grad)), True, 32**-0.5)
    for found, exact in zip(gradients, right[1:4], strict=True):
        assert torch.allclose(found.double(), exact, atol=1e-5)


@pytest.mark.parametrize(
    "group, T, S, causal", [(1, 5, 5, True), (2, 3, 6, True), (2, 4, 3, False)]
)
def test_gradients_by_differences(group, T, S, causal):
    inputs = [x.cpu().requires_grad_() for x in some(T, S, group, 5, FP64, heads=2)[:3]]
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, causal=causal), inputs)


def test_only_what_needs_a_gradient_gets_one(route):
    q, k, v, grad = some(20)
    q.requires_grad_()
    flash_attention(q, k, v).backward(grad)
    assert q.grad is not None and k.grad is None and v.grad is None


def test_a_gradient_of_the_gradient_is_refused(route):
    leaves = [x.requires_grad_() for x in some(20)[:3]]
    (dq,) = torch.autograd.grad(flash_attention(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(dq.sum(), leaves)


COMPILER = "inductor" if ON_GPU else "aot_eager"  # which compiles no C++, and checks as much


def layer(q, k, v):
    return flash_attention(q * 2, k, v).transpose(1, 2).flatten(2).square()


def assert_compiled_right(compiled_layer, T, S):
    *inputs, grad = some(T, S, 4, heads=2, B=2)
    results = []
    for function in (layer, compiled_layer):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = grad.transpose(1, 2).flatten(2)
        results.append([out, *torch.autograd.grad(out, leaves, weights)])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("T, S", [(30, 30), (7, 29)])
def test_compiled_as_one_graph(T, S):
    torch.compiler.reset()
    assert_compiled_right(torch.compile(layer, fullgraph=True, backend=COMPILER), T, S)


def test_compiled_for_any_length():
    torch.compiler.reset()
    compiled_layer = torch.compile(layer, fullgraph=True, backend=COMPILER)
    for T, S in ((30, 30), (7, 29), (33, 40)):
        assert_compiled_right(compiled_layer, T, S)


@pytest.mark.parametrize("T, S, causal", [(20, 20, True), (5, 13, True), (6, 4, False)])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, heads_beside, cached], ids=label)
def test_the_operators_are_what_they_say(layout, T, S, causal):
    q, k, v, grad = (layout(x) for x in some(T, S, 2, heads=2, B=2))
    out, lse = flash.flash_forward(q, k, v, causal, 0.2)
    torch.library.opcheck(flash.flash_backward, (grad, q, k, v, out, lse, causal, 0.2))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash.flash_forward, (*leaves, causal, 0.2))


# ---- what is refused ---------------------------------------------------------------------------


def ones(*size, dtype=FP32, device=DEVICE):
    return torch.ones(size, dtype=dtype, device=device)


KEYS = ones(1, 2, 6, 16)
REFUSED = {
    "q must be (B, H, T, D)": (ones(2, 6, 16), KEYS, KEYS, {}),
    "not q (2,), k (2,), v (2,)": (ones(2), ones(2), ones(2), {}),
    "k and v alike": (ones(1, 2, 6, 16), KEYS, ones(1, 2, 7, 16), {}),
    "batch and channels must agree": (ones(2, 2, 6, 16), KEYS, KEYS, {}),
    "k (1, 2, 6, 16), v": (ones(1, 2, 6, 32), KEYS, KEYS, {}),
    "nothing be empty": (ones(1, 2, 0, 16), KEYS, KEYS, {}),
    "be empty: q (1, 2, 6, 16)": (ones(1, 2, 6, 16), *[ones(1, 2, 0, 16)] * 2, {"causal": False}),
    "be empty: q (1, 0, 6, 16)": (ones(1, 0, 6, 16), *[ones(1, 0, 6, 16)] * 2, {}),
    "3 query heads cannot share 2 key heads evenly": (ones(1, 3, 6, 16), KEYS, KEYS, {}),
    "1 query heads cannot share 2": (ones(1, 1, 6, 16), KEYS, KEYS, {}),
    "a key for every query: 7 queries, 6 keys": (ones(1, 2, 7, 16), KEYS, KEYS, {}),
    "and 1e30, not 0": (KEYS, KEYS, KEYS, {"scale": 0.0}),
    "and 1e30, not -1": (KEYS, KEYS, KEYS, {"scale": -1.0}),
    "and 1e30, not 1e-46": (KEYS, KEYS, KEYS, {"scale": 1e-46}),  # in float32 it is zero
    "and 1e30, not nan": (KEYS, KEYS, KEYS, {"scale": math.nan}),
    "and 1e30, not inf": (KEYS, KEYS, KEYS, {"scale": math.inf}),
    "not torch.float32 on": (KEYS, KEYS.half(), KEYS.half(), {}),
    "torch.float64 on": (KEYS, KEYS, KEYS.double(), {}),
    "on meta": (KEYS, KEYS.to("meta"), KEYS, {}),
    "or more, not torch.int64": (KEYS.long(), KEYS.long(), KEYS.long(), {}),
    "or more, not torch.bool": (KEYS.bool(), KEYS.bool(), KEYS.bool(), {}),
    "or more, not torch.complex64": (*[KEYS.to(torch.complex64)] * 3, {}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_bad_input_is_one_clear_error(says):
    q, k, v, options = REFUSED[says]
    with pytest.raises(ValueError) as caught:
        flash_attention(q, k, v, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_heads_without_channels_are_refused():
    nothing = ones(1, 2, 6, 0)
    with pytest.raises(ValueError, match="empty"):
        flash_attention(nothing, nothing, nothing)


def test_a_number_for_a_tensor_is_refused():
    with pytest.raises(ValueError, match="q must be"):
        flash_attention(ones(), ones(), ones())


@on_gpu
@pytest.mark.parametrize("dtype, D", [(FP64, 32), (BF16, 48), (FP32, 256)], ids=label)
def test_what_no_kernel_takes_is_refused_on_a_gpu(dtype, D):
    x = ones(1, 2, 6, D, dtype=dtype)
    with pytest.raises(ValueError, match=f"with heads of 16, 32, 64, 128 .* not {dtype} with {D}"):
        flash_attention(x, x, x)


PLAIN = """
    import torch
    import nanolm.flash
    from nanolm import flash_attention, has_triton

    leaves = [torch.ones(1, heads, 9, 24, requires_grad=True) for heads in (4, 2, 2)]
    out = flash_attention(*leaves)
    out.sum().backward()
    print(has_triton(), out.detach().unique().tolist(), round(leaves[2].grad.sum().item(), 2))
    try:
        nanolm.flash.launch_forward(*(x.detach() for x in leaves), True, 0.2)
    except ImportError as error:
        print(error)
"""


def test_without_triton_plain_pytorch_does_it():
    first, second = python(NO_TRITON + PLAIN, CUDA_VISIBLE_DEVICES="").splitlines()
    assert first == f"False [1.0] {4 * 9 * 24:.1f}"
    assert "needs Triton, which is not installed" in second


# ---- compiled for cards that are not here ------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """What every kernel takes of every card, by case and kernel, from processes that compile."""
    rows = compiled_rows("flash_gate", ("80", "86"), ("89", "90"))
    return {(row["case"], row["kernel"]): row for row in rows}


GATE = [
    pytest.param(case, f"{kernel}_kernel", "", id=f"{case}-{kernel}")
    for card in flash_gate.CARDS
    for case in flash_gate.chosen(card)
    for kernel in ("forward", "dq", "dkdv")
]
GATE += [
    pytest.param(case, f"{kernel}_kernel", "-turned", id=f"{case}-{kernel}-turned")
    for card in flash_gate.CARDS
    for case in filter(flash_gate.turned, flash_gate.chosen(card))
    for kernel in ("dq", "dkdv")
]


@with_kernels
@pytest.mark.parametrize("case, kernel, turned", GATE)
def test_kernels_fit_the_card_and_spill_nothing(compiled, case, kernel, turned):
    row = compiled[str(case) + turned, kernel]
    assert row["shared"] <= SHARED[case.card] * 1024, row
    if case.dtype != "float32":  # which at full precision has no tensor cores, and may spill
        spare = 16 if turned and case.D == 128 else 0  # four registers put aside, at the end
        assert row["stack"] <= spare, row
        assert row["tensor_cores"] > 0, row
