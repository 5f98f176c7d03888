"""What lies between the products against plain PyTorch in float64, at sizes that fill no tile.

Without a GPU the kernels are interpreted, and the checker looks at every address. On a GPU the same
tests run them for real. Poison surrounds what they read.
"""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from apart import compiled_rows
from place import DEVICE, ON_GPU, RUNS, on_gpu, with_kernels
from seeded import one_seed  # noqa: F401

from nanolm import fused, loss
from nanolm.interpret import SHARED, checked, has_triton, interpreting, poisoned
from nanolm.model import apply_rotary, rotary_tables

ROOT = Path(__file__).resolve().parent.parent
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = [(1, 16), (7, 32), (37, 64), (129, 128), (33, 256), (5, 2048)]  # rows, channels


def test_where_triton_is_kernels_run():
    """Else half of what follows would be skipped, and nobody would notice."""
    assert RUNS or not has_triton()


def some(*shapes, dtype=BF16):
    """Numbers drawn on the CPU: everywhere the same."""
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def in_poison(x):
    """A copy of x, in one piece, with poison on both sides."""
    return poisoned((x.numel(),), x.flatten(), 64, x.dtype)[0].view(x.shape)


def guarded(launch, *inputs):
    """What a launcher gives, from inputs that lie in poison."""
    inputs = [in_poison(x) if torch.is_tensor(x) else x for x in inputs]
    with checked() if interpreting() else contextlib.nullcontext():
        return launch(*inputs)


def wide(inputs):
    return [x.to(FP64) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]


def as_near(found, plain, right):
    """Our errors against float64 are at most twice those of PyTorch in the same type."""
    for ours, theirs, exactly in zip(found, plain, right, strict=True):
        error, allowed = ((x.to(FP64) - exactly).norm() for x in (ours, theirs))
        assert ours.dtype == theirs.dtype
        assert error <= 2 * allowed + 1e-6 * exactly.norm() + 1e-9


@with_kernels
@pytest.mark.parametrize("N, C", SIZES)
@pytest.mark.parametrize("added", [True, False])
def test_norm(N, C, added):
    x, delta, weight = some((N, C), (N, C), C)
    given = x, delta if added else None, weight, 1e-5
    found = guarded(fused.launch_norm, *given)
    as_near(found, fused.plain_norm(*given), fused.plain_norm(*wide(given)))
    picked = x, None, weight, 1e-5, torch.randint(N, (N + 3,)).to(DEVICE)
    found = guarded(fused.launch_norm, *picked)
    as_near(found, fused.plain_norm(*picked), fused.plain_norm(*wide(picked)))


@with_kernels
@pytest.mark.parametrize("N, C", SIZES)
@pytest.mark.parametrize("beside", [True, False])
def test_norm_back(N, C, beside):
    grad, x, weight, past = some((N, C), (N, C), C, (N, C))
    scale = torch.rand(N).to(DEVICE) + 0.5
    given = grad, x, scale, weight, past if beside else None

    def kernel(*inputs):
        parts = torch.full((-(-N // fused.SHARE), C), torch.nan, device=DEVICE)
        return fused.launch_norm_back(*inputs, parts), parts.sum(0)

    def plain(*inputs):
        parts = inputs[2].new_zeros(1, C)
        return fused.plain_norm_back(*inputs, parts), parts.sum(0)

    as_near(guarded(kernel, *given), plain(*given), plain(*wide(given)))


def test_the_plain_norm_back_is_autograds():
    x, delta, grad, past = some(*[(5, 12)] * 4, dtype=FP64)
    weight = torch.randn(12, dtype=FP64, requires_grad=True, device=DEVICE)
    x.requires_grad_()
    y = torch.nn.functional.rms_norm(x + delta, (12,), weight, 1e-3)
    right = torch.autograd.grad((y * grad).sum() + ((x + delta) * past).sum(), (x, weight))
    with torch.no_grad():
        new, found, scale = fused.plain_norm(x, delta, weight, 1e-3)
        parts = torch.zeros(1, 12, dtype=FP64, device=DEVICE)
        dx = fused.plain_norm_back(grad, new, scale, weight, past, parts)
    for a, b in zip((found, dx, parts[0]), (y, *right), strict=True):
        assert torch.allclose(a, b)


@with_kernels
@pytest.mark.parametrize(
    "B, T, heads, all_heads, D", [(1, 1, 1, 1, 16), (3, 5, 2, 4, 32), (2, 65, 5, 6, 64)]
)
def test_rotation(B, T, heads, all_heads, D):
    cos, sin = (table.to(DEVICE) for table in rotary_tables(T, D))
    (x,) = some((B, T, all_heads * D))
    for sign in (1.0, -1.0):
        results = []
        for launch, value in (
            (fused.launch_rotate, x), (fused.plain_rotate, x), (fused.plain_rotate, x.double())
        ):  # fmt: skip
            turned = in_poison(value)
            with checked() if interpreting() else contextlib.nullcontext():
                launch(turned, cos, sign * sin, heads)
            results.append((turned,))
        as_near(*results)
        assert torch.equal(results[0][0][..., heads * D :], x[..., heads * D :])


def test_the_plain_rotation_is_the_models_and_turns_back():
    (x,) = some((2, 7, 3 * 8), dtype=FP64)
    cos, sin = (table.to(DEVICE) for table in rotary_tables(7, 8))
    turned = x.clone()
    fused.plain_rotate(turned, cos, sin, 2)
    heads = x.view(2, 7, 3, 8).transpose(1, 2)
    right = torch.cat((apply_rotary(heads[:, :2], cos, sin), heads[:, 2:]), 1)
    assert torch.allclose(turned.view(2, 7, 3, 8).transpose(1, 2), right)
    fused.plain_rotate(turned, cos, -sin, 2)
    assert torch.allclose(turned, x, atol=1e-6)


@with_kernels
@pytest.mark.parametrize("N, F", SIZES)
def test_gate(N, F):
    both, grad = some((N, 2 * F), (N, F))
    both[0, 0], both[0, 1] = 80.0, -80.0  # where the sigmoid ends
    found = guarded(fused.launch_gate, both)
    as_near((found,), (fused.plain_gate(both),), (fused.plain_gate(both.double()),))
    given = grad, both
    found = guarded(fused.launch_gate_back, *given)
    plain, right = fused.plain_gate_back(*given), fused.plain_gate_back(*wide(given))
    as_near((found,), (plain,), (right,))


def test_the_plain_gate_back_is_autograds():
    both, grad = some((5, 14), (5, 7), dtype=FP64)
    both.requires_grad_()
    (right,) = torch.autograd.grad(fused.plain_gate(both), both, grad)
    assert torch.allclose(fused.plain_gate_back(grad, both.detach()), right)


RUNS_OF = {  # tokens by word: short runs, runs to the border, over one border, over many
    "all apart": range(100),
    "one": [7] * 100,
    "to the border": [0] * 32 + [1] * 32 + [2] * 32 + [3],
    "over it": [0] * 31 + [1] * 2 + [2] * 31 + [3] * 33,
    "over many": [0] * 5 + [1] * 200 + [2] * 3 + [3] * 100 + [9],
    "a single token": [4],
    "less than a tile": [1, 1, 3],
    "mixed": [i * i % 11 for i in range(300)],
}


@with_kernels
@pytest.mark.parametrize("runs", RUNS_OF)
@pytest.mark.parametrize("C", [16, 256])
def test_rows_are_added_up(runs, C):
    ids = torch.tensor(RUNS_OF[runs])[torch.randperm(len(RUNS_OF[runs]))].to(DEVICE)
    (grad,), V = some((len(ids), C)), int(ids.max()) + 2
    words, order = torch.sort(ids.int(), stable=True)
    right = torch.ones(V, C, dtype=FP64, device=DEVICE).index_add_(0, ids, grad.double())
    found = []
    for _ in range(2):
        place = in_poison(torch.ones(V, C, device=DEVICE))
        guarded(
            lambda *given, place=place: fused.launch_add_rows(place, *given), words, order, grad
        )
        assert torch.allclose(place.double(), right, rtol=1e-5, atol=1e-4)
        found.append(place)
    assert torch.equal(*found)


@with_kernels
@pytest.mark.parametrize("ids", [[5, 1, 4], [-1, 2, 2], [9] * 70 + [1], [-3] * 40 + [3] * 40])
def test_ids_that_are_no_words_touch_nothing_and_are_seen(ids):
    ids, V = torch.tensor(ids).to(DEVICE), 4
    (grad, table, weight) = some((len(ids), 16), (V, 16), 16)
    place, right = (torch.ones(V, 16, device=DEVICE) for _ in range(2))
    real = (ids >= 0) & (ids < V)
    right.index_add_(0, ids[real], grad[real].float())
    words, order = torch.sort(ids.int(), stable=True)
    guarded(lambda *given: fused.launch_add_rows(place, *given), words, order, grad)
    assert torch.allclose(place, right, atol=1e-4)
    _, out, _ = guarded(fused.launch_norm, table, None, weight, 1e-5, ids)
    assert torch.equal(out.isfinite().all(1), real)


@with_kernels
@pytest.mark.parametrize("seed", range(10))
def test_rows_of_any_runs_are_added_up(seed):
    torch.manual_seed(seed)
    ids = torch.randint(1, 40, (torch.randint(1, 400, ()),)) ** 2 // 40  # common and rare words
    (grad,), ids = some((len(ids), 16)), ids.to(DEVICE)
    place, right = (torch.zeros(41, 16, dtype=dtype, device=DEVICE) for dtype in (FP32, FP64))
    fused.launch_add_rows(place, *torch.sort(ids.int(), stable=True), grad)
    assert torch.allclose(place.double(), right.index_add_(0, ids, grad.double()), atol=1e-4)


@with_kernels
@pytest.mark.parametrize("sizes", [(1,), (8192, 3), (8191,), (20_000, 1, 700)])
@pytest.mark.parametrize("limit", [1.0, 1e9, math.inf])
def test_length_of_all_gradients(sizes, limit):
    grads = some(*sizes, dtype=FP32)
    loss, good = torch.tensor(2.0, device=DEVICE), torch.tensor(True, device=DEVICE)
    norm, scale = guarded(
        lambda *rows: fused.launch_clip(list(rows), loss, good, 3, limit, False), *grads
    )
    right = torch.cat(grads).double().norm() / 3
    assert norm.item() == pytest.approx(right.item(), rel=1e-6)
    assert scale.item() == pytest.approx(min(limit / right.item(), 1) / 3, rel=2e-6)
    assert good
    again = fused.launch_clip(grads, loss, good, 3, limit, False)
    assert torch.equal(again[0], norm) and torch.equal(again[1], scale)


@with_kernels
def test_length_from_many_parts():
    parts = in_poison(torch.rand(2500).to(DEVICE))
    norm, scale, loss = torch.zeros(3, device=DEVICE).unbind()
    good = torch.tensor(True, device=DEVICE)
    fused.clip_kernel[(1,)](parts, loss, good, norm, scale, 2500, 1, 1.0, False, BLOCK=1024)
    assert norm.item() == pytest.approx(parts.double().sum().sqrt().item(), rel=1e-6)


@with_kernels
@pytest.mark.parametrize("way", [fused.launch_clip, fused.plain_clip])
@pytest.mark.parametrize("latch", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("loss", "number"), [(1, 1), (1, math.nan), (1, -math.inf), (math.nan, 1), (math.inf, 1)]
)
def test_what_is_not_finite_is_not_good(way, latch, before, loss, number):
    grads = some(9000, 40, dtype=FP32)
    grads[0][8500] = number
    good = torch.tensor(before, device=DEVICE)
    way(grads, torch.tensor(float(loss), device=DEVICE), good, 1, 1.0, latch)
    assert good.item() is (math.isfinite(loss + number) and (before or not latch))


@with_kernels
@pytest.mark.parametrize("N", [1, 1023, 1024, 2500])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update(N, decay):
    weight, avg, grad = some(N, N, N, dtype=FP32)
    square = torch.rand(N).to(DEVICE)
    scale, hyper = (torch.tensor(x).to(DEVICE) for x in (0.3, [1e-2, 0.4, 0.3]))
    results = []
    for way, kind in (
        (fused.launch_adamw, FP32),
        (fused.plain_adamw, FP32),
        (fused.plain_adamw, FP64),
    ):
        row = [in_poison(x.to(kind)) for x in (weight, avg, square)]
        row.append(torch.zeros(N, dtype=BF16, device=DEVICE))
        with checked() if interpreting() else contextlib.nullcontext():
            numbers = grad.to(kind), scale.to(kind), hyper.to(kind), torch.tensor(True).to(DEVICE)
            way(*row, *numbers, (0.9, 0.95), 1e-8, decay)
        assert torch.equal(row[3], row[0].to(BF16))
        results.append(row[:3])
    as_near(*results)


@with_kernels
@pytest.mark.parametrize("way", [fused.launch_adamw, fused.plain_adamw])
def test_an_update_that_is_not_good_changes_nothing(way):
    weight, avg = some(1500, 1500, dtype=FP32)
    row = [weight.clone(), avg.clone(), avg.square(), weight.to(BF16)]
    grad, one = torch.full((1500,), torch.nan, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    hyper, good = torch.full((3,), 0.1, device=DEVICE), torch.tensor(False, device=DEVICE)
    way(*row, grad, one, hyper, good, (0.9, 0.95), 1e-8, 0.1)
    for found, before in zip(row, (weight, avg, avg.square(), weight.to(BF16)), strict=True):
        assert torch.equal(found, before)


def test_what_the_kernels_cannot_take_goes_the_plain_way():
    x = torch.zeros(3, 48)
    assert not fused.has_fused(48, x)
    gone = fused.norm(x + 1, None, torch.ones(48), 0.0)
    assert torch.equal(gone[1], x + 1)


@on_gpu
def test_on_a_gpu_bfloat16_of_a_fitting_width_goes_by_the_kernels():
    x = torch.zeros(3, 64, dtype=BF16, device="cuda")
    assert fused.has_fused(64, x, None)
    for width, *others in ((48, x), (8, x), (64, x, x.float()), (64, x, x.expand(2, 3, 64))):
        assert not fused.has_fused(width, *others)


HOPPER = ON_GPU and loss.is_hopper(torch.device("cuda"))
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper card")


def turning(B, T, D, V, half, heads):
    """What a product with heads to turn is given; and the plain way to compute it."""
    x, weight = some((B * T, D), (V, D))
    cos, sin = (x.to(DEVICE)[:T] for x in rotary_tables(T + 5, 2 * half))  # as the step cuts them

    def plain(x, weight, cos, sin, heads):
        out = x @ weight.T
        fused.plain_rotate(out.view(B, T, V), cos, sin, heads)
        return (out,)

    return (x, weight / D**0.5, cos, sin, heads), plain


@on_hopper
@pytest.mark.parametrize("B, T", [(1, 1), (3, 21), (1, 64), (5, 13), (2, 512), (700, 3), (1, 9000)])
@pytest.mark.parametrize(
    "D, V, half, heads", [(64, 128, 8, 5), (128, 256, 32, 3), (256, 384, 16, 10), (256, 384, 64, 2)]
)
def test_a_product_and_its_rotation_in_one_kernel(B, T, D, V, half, heads):
    inputs, plain = turning(B, T, D, V, half, heads)
    assert fused.can_stay(*inputs[:2])
    found = guarded(fused.launch_product_turned, *inputs)
    as_near((found,), plain(*inputs), plain(*wide(inputs)))
    for _ in range(20):
        assert torch.equal(fused.product_turned(*inputs), found)


def plain_product_norm(x, weight, stream, norm_weight, eps):
    return fused.plain_norm(stream, x @ weight.T, norm_weight, eps)


@on_hopper
@pytest.mark.parametrize("N", [1, 63, 64, 65, 1000, 9000, 40000])
@pytest.mark.parametrize("D, kind", [(64, FP32), (128, BF16), (256, FP32), (256, BF16)])
def test_a_product_its_sum_and_their_norm_in_one_kernel(N, D, kind):
    x, weight, stream = some((N, D), (D, D), (N, D))
    inputs = x, weight / D**0.5, stream, *some((D,), dtype=kind), 1e-5
    assert fused.can_stay(*inputs[:3])
    found = guarded(fused.launch_product_norm, *inputs)
    as_near(found, plain_product_norm(*inputs), plain_product_norm(*wide(inputs)))
    for _ in range(20):
        assert all(map(torch.equal, fused.product_norm(*inputs), found))


@on_hopper
def test_a_row_that_is_no_number_stays_alone_through_a_product():
    x, weight, stream, norm_weight = some((200, 256), (256, 256), (200, 256), (256,))
    x[70, 3] = math.nan
    turned = fused.product_turned(x, weight, *(t.to(DEVICE) for t in rotary_tables(200, 32)), 8)
    for found in (turned, *fused.product_norm(x, weight, stream, norm_weight, 1e-5)):
        bad = found.isnan().view(200, -1)
        assert bad[70].all() and bad.sum() == bad[70].numel()


@pytest.mark.parametrize("D", [24, 64])
def test_products_that_the_kernels_do_not_take_go_the_plain_way(D):
    x, weight, stream, norm_weight = some((12, D), (3 * D, D), (12, D), (D,), dtype=FP64)
    cos, sin = (x.to(DEVICE, FP64) for x in rotary_tables(4, 8))
    right = x @ weight.T
    fused.plain_rotate(right.view(3, 4, 3 * D), cos, sin, 2)
    assert torch.equal(fused.product_turned(x, weight, cos, sin, 2), right)
    found = fused.product_norm(x, weight[:D], stream, norm_weight, 1e-5)
    assert all(
        map(torch.equal, found, plain_product_norm(x, weight[:D], stream, norm_weight, 1e-5))
    )


@pytest.fixture
def as_on_hopper(monkeypatch):
    """Let the choice of a way believe in a Hopper card; what it launches says so and stops."""

    def launched(*_):
        raise RuntimeError("launched")

    monkeypatch.setattr(fused, "can_at_once", lambda x: x.size(1) in (64, 128, 256))
    monkeypatch.setattr(fused, "launch_product_turned", launched)
    monkeypatch.setattr(fused, "launch_product_norm", launched)


def by_kernel(way, *inputs):
    try:
        way(*inputs)
    except RuntimeError as error:
        return str(error) == "launched"  # else the plain way cannot take it either
    return False


def aside(x):
    """The same numbers at an address that is no multiple of 16 bytes."""
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)


def test_which_products_with_a_rotation_go_by_the_kernel(as_on_hopper):
    (x, weight, cos, sin, heads), _ = turning(3, 8, 128, 256, 16, 5)
    way, longer = fused.product_turned, torch.cat((weight, weight))
    assert by_kernel(way, x, weight, cos, sin, heads)
    assert by_kernel(way, x, longer[:128], cos, sin, 4)
    for inputs in (
        (x.float(), weight, cos, sin), (x[:20], weight, cos, sin), (x[:0], weight, cos, sin),
        (x, longer[:192], cos, sin), (x, weight[:, :64], cos, sin), (x, aside(weight), cos, sin),
        (x, torch.cat((weight, weight), 1)[:, :128], cos, sin), (x, weight.T, cos, sin),
        (x, weight, cos.T.contiguous().T, sin), (x, weight, cos[:, :6], sin[:, :6]),
    ):  # fmt: skip
        assert not by_kernel(way, *inputs, 2)


def test_which_products_with_a_norm_go_by_the_kernel(as_on_hopper):
    x, weight, stream, norm_weight = some((24, 64), (64, 64), (24, 64), (64,))
    way, two = fused.product_norm, torch.stack((norm_weight, norm_weight), 1)
    assert by_kernel(way, x, weight, stream, norm_weight, 1e-5)
    assert by_kernel(way, x, weight, stream, norm_weight.float(), 1e-5)
    for inputs in (
        (x, weight, stream[:12], norm_weight), (x, weight, stream.float(), norm_weight),
        (x, weight, stream, two[:, 0]), (x, aside(weight), stream, norm_weight),
        (x[:, :32], weight[:, :32], stream, norm_weight), (x[:0], weight, stream[:0], norm_weight),
        (x, weight[:32], stream[:, :32], norm_weight[:32]),
        (x.T.contiguous().T, weight, stream, norm_weight),
    ):  # fmt: skip
        assert not by_kernel(way, *inputs, 1e-5)


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_compiled_for_cards_that_are_not_here():
    rows = compiled_rows("fused_gate")
    assert len({row["kernel"] for row in rows}) == 12
    for row in rows:
        card = int(row["case"][3:5])
        assert row["stack"] == 0 and row["shared"] <= SHARED[card] * 1024, row
