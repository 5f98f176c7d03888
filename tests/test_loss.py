"""The loss against the formula in float64, at sizes and layouts that nobody tries first.

Without a GPU the kernels are interpreted, and the checker looks at every address. On a GPU the same
tests run them for real. Poison surrounds what they read.
"""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from alive import Alive
from apart import NO_TRITON, compiled_rows, python
from place import DEVICE, ON_GPU, RUNS, on_gpu, with_kernels
from seeded import one_seed  # noqa: F401

from nanolm import loss
from nanolm.interpret import SHARED, Missing, checked, has_triton, interpreting, poisoned
from nanolm.loss import (
    HOPPER_TILES,
    OTHER_TILES,
    Beside,
    LossTiles,
    launch_loss,
    linear_cross_entropy,
    loss_by_chunks,
)
from nanolm.model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent.parent
# infinite weights are meant here; NumPy, which interprets, finds them worth a word
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("loss", "d_hidden", "d_weight")
IGNORE = -100
SMALL = LossTiles(16, 16, 4, 2)
BOXES = LossTiles(32, 16, 4, 2, True)
TILES = [OTHER_TILES, SMALL, BOXES, HOPPER_TILES] + [None] * ON_GPU  # None: what a card uses


def test_where_triton_is_kernels_run():
    """Else half of what follows would be skipped, and nobody would notice."""
    assert RUNS or not has_triton()


# ---- the judge, and what is judged -------------------------------------------------------------


def formula(hidden, weight, targets, ignore_index=IGNORE):
    """The loss and its gradients as PyTorch has them: logits in the type of hidden, then wide."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, FP32))
    value = F.cross_entropy(logits, targets, ignore_index=ignore_index)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def assert_accurate(found, hidden, weight, targets, ignore_index=IGNORE):
    """Our error against float64 is at most twice that of PyTorch in the same type."""
    narrow = weight.to(hidden.dtype)  # what both multiply with
    right = formula(hidden.double(), narrow.double(), targets, ignore_index)
    plain = formula(hidden, narrow, targets, ignore_index)
    for name, ours, theirs, exact in zip(NAMES, found, plain, right, strict=True):
        error, allowed = ((x.double() - exact).norm().item() for x in (ours, theirs))
        allowed = 2 * allowed + 1e-6 * exact.norm().item() + 1e-12
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def some(N, V, D, dtype=BF16, spread=1.0):
    """States, words and targets, drawn on the CPU: everywhere the same."""
    hidden, weight = torch.randn(N, D), spread * torch.randn(V, D)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), torch.randint(V, (N,)).to(DEVICE)


def by_kernels(hidden, weight, targets, ignore_index=IGNORE, grads=True, **options):
    """The kernels' results, from inputs that lie in poison."""
    hidden, weight = (poisoned(x.shape, x, 64)[0] for x in (hidden, weight))
    targets, _ = poisoned(targets.shape, targets, 64)
    with checked() if interpreting() else contextlib.nullcontext():
        return launch_loss(hidden, weight, targets, ignore_index, grads, **options)


def label(value):
    """A short name for a parameter of a test."""
    if isinstance(value, LossTiles):
        return "x".join(map(str, value[:2])) + "box" * value.BOX
    return str(getattr(value, "__name__", value)).removeprefix("torch.")


# ---- the kernels -------------------------------------------------------------------------------

SIZES = [  # tokens, words, channels, rows of a chunk, shares of the vocabulary
    (1, 1, 16, 0, 0),
    (1, 2, 16, 0, 1),
    (7, 31, 32, 0, 3),
    (63, 32, 16, 32, 2),
    (64, 33, 64, 64, 5),
    (65, 65, 32, 64, 1),
    (129, 1000, 32, 64, 3),
    (300, 257, 16, 128, 4),
    (40, 70, 48, 32, 2),
    (40, 100, 96, 0, 2),
    (33, 129, 256, 0, 3),
    (20, 50, 384, 0, 2),
    (5, 1401, 128, 0, 40),
]
if ON_GPU:  # more for the kernel that only a card can run
    SIZES += [
        (3, 70, 256, 0, 0),
        (300, 1000, 256, 128, 3),
        (129, 257, 64, 0, 2),
        (4000, 4096, 256, 0, 0),
    ]
    SIZES += [(513, 513, 128, 256, 9), (128, 256, 256, 0, 1), (700, 32000, 256, 0, 0)]


@with_kernels
@pytest.mark.parametrize("N, V, D, rows, splits", SIZES)
@pytest.mark.parametrize("tiles", TILES, ids=label)
def test_every_size(N, V, D, rows, splits, tiles):
    given = some(N, V, D, spread=min(1.0, 4 / D**0.5))  # no softmax that is a single word's
    whole = tiles.ROWS if tiles else 128
    rows = -(-rows // whole) * whole  # a chunk is whole tiles
    assert_accurate(by_kernels(*given, tiles=tiles, rows=rows, splits=splits), *given)


@with_kernels
@pytest.mark.parametrize("tiles", TILES, ids=label)
def test_without_gradients_the_same_loss(tiles):
    given = some(100, 300, 32)
    with_them = by_kernels(*given, tiles=tiles)
    value, d_hidden, d_weight = by_kernels(*given, grads=False, tiles=tiles)
    assert torch.equal(value, with_them[0]) and d_hidden.numel() == d_weight.numel() == 0


@with_kernels
@pytest.mark.parametrize("ignore_index", [-100, -1, 5, 10**6])
def test_tokens_that_do_not_count(ignore_index):
    hidden, weight, targets = some(90, 40, 32)
    targets[::3] = ignore_index
    found = by_kernels(hidden, weight, targets, ignore_index, tiles=SMALL, rows=32)
    assert_accurate(found, hidden, weight, targets, ignore_index)
    assert not found[1][targets == ignore_index].any()


@with_kernels
def test_a_whole_chunk_that_does_not_count():
    hidden, weight, targets = some(96, 40, 32)
    targets[32:64] = IGNORE
    found = by_kernels(hidden, weight, targets, tiles=SMALL, rows=32)
    assert_accurate(found, hidden, weight, targets)


@with_kernels
@pytest.mark.parametrize("tiles", TILES, ids=label)
def test_the_same_bits_every_time(tiles):
    given = some(200, 300, 32)
    one, two = (by_kernels(*given, tiles=tiles, rows=128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class NoStream(Beside):
    """Stands in for a second stream, and notes what is asked of it."""

    def __init__(self):
        self.stream, self.held, self.asked = None, [], []

    def follow(self):
        self.asked.append("follow")

    def join(self):
        self.asked.append("join")
        self.held.clear()


@with_kernels
def test_a_gradient_is_added_to_its_place_beside_or_not():
    hidden, weight, targets = some(300, 90, 32)
    plain = launch_loss(hidden, weight, targets, IGNORE, True, SMALL, rows=128)
    for beside in (None, NoStream()):
        place = torch.ones(90, 32, device=hidden.device)
        options = {"rows": 128, "place": place, "beside": beside}
        loss, d_hidden, _ = launch_loss(hidden, weight, targets, IGNORE, True, SMALL, **options)
        assert torch.equal(loss, plain[0]) and torch.equal(d_hidden, plain[1])
        assert torch.allclose(place - 1, plain[2], atol=1e-6)
    assert beside.asked == ["follow", "join", "follow", "join", "follow"]  # nobody waits at the end
    assert beside.held  # until it is joined


@with_kernels
@pytest.mark.parametrize("kind", ["weight in float32", "not contiguous", "misaligned", "repeated"])
def test_layouts(kind):
    hidden, weight, targets = some(70, 90, 32)
    right = launch_loss(hidden, weight, targets, IGNORE, True, SMALL)
    if kind == "weight in float32":
        weight = weight.float()
    elif kind == "not contiguous":
        hidden, weight = (x.T.contiguous().T for x in (hidden, weight))
    elif kind == "misaligned":
        room = hidden.new_empty(hidden.numel() + 1)
        hidden = room[1:].view_as(hidden).copy_(hidden)
    else:
        hidden, targets = hidden[:1].expand(70, 32), targets[:1].expand(70)
        right = launch_loss(hidden.clone(), weight, targets.clone(), IGNORE, True, SMALL)
    found = launch_loss(hidden, weight, targets, IGNORE, True, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


# ---- guesses that were wrong -------------------------------------------------------------------


@with_kernels
@pytest.mark.parametrize("nats", [30, 43, 46, 87, 90, 1e3, 1e5])
@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("tiles", [SMALL, BOXES], ids=label)
def test_a_target_far_below_the_best_word(nats, rows, tiles):
    hidden, weight, targets = some(70, 90, 32)
    bad = slice(40, 41) if rows == "one" else slice(None)
    for i in range(*bad.indices(70)):  # against the target's word, as far as it takes
        w = weight[targets[i]].float()
        hidden[i] = (-nats * w / w.square().sum()).to(hidden.dtype)
    assert formula(hidden.double(), weight.double(), targets)[0] > nats / 80
    assert_accurate(
        by_kernels(hidden, weight, targets, tiles=tiles, rows=32), *(hidden, weight, targets)
    )


@with_kernels
def test_a_target_far_above_all_other_words():
    hidden, weight, targets = some(70, 90, 32)
    hidden = 100 * weight[targets]
    found = by_kernels(hidden, weight, targets, tiles=SMALL)
    scores = (hidden.double() * weight[targets].double()).sum(-1)  # in float32 not exact
    assert 0 <= found[0] < 1e-6 * scores.max()
    assert all(x.abs().max() < 1e-6 * scores.max() for x in found)


@with_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_loss(value):
    hidden, weight, targets = some(70, 90, 32)
    hidden[30, 3] = value
    found = by_kernels(hidden, weight, targets, tiles=SMALL, rows=32)
    assert not found[0].isfinite()
    assert found[1][:16].isfinite().all(), "rows of other tiles are not touched"


@with_kernels
def test_a_target_that_is_no_word_shows_in_the_loss():
    hidden, weight, targets = some(40, 90, 32)
    for bad in (90, -1, 2**40):
        targets[7] = bad
        for way in (by_kernels, lambda *x: loss_by_chunks(*x, IGNORE, True)):
            found = way(hidden, weight, targets)
            assert found[0].isnan() and found[1].isnan().any() and found[2].isnan().any()


# ---- plain PyTorch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=label)
@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_chunks_in_plain_pytorch(dtype, chunk):
    hidden, weight, targets = some(50, 30, 7, dtype, 0.3)
    targets[::7] = IGNORE
    found = loss_by_chunks(hidden, weight, targets, IGNORE, True, chunk)
    assert found[0].dtype == found[2].dtype == torch.promote_types(dtype, FP32)
    assert_accurate(found, hidden, weight, targets)


def test_only_a_chunk_of_logits_is_alive():
    hidden, weight, targets = some(400, 100, 8, FP32)
    with Alive() as alive:
        loss_by_chunks(hidden, weight, targets, IGNORE, True, chunk=2000)
    assert alive.largest <= 400 * 8  # the gradient of hidden; all logits are ten times as many
    assert alive.most <= 4 * (400 * 8 + 3 * 100 * 8 + 5 * 2000 + 400)


@on_gpu
@pytest.mark.parametrize("grads", [True, False])
def test_memory_of_a_step(grads):
    hidden, weight, targets = some(32768, 32000, 256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    launch_loss(hidden, weight.float(), targets, IGNORE, grads)
    assert torch.cuda.max_memory_allocated() - before <= (5e8 if grads else 1e8)


# ---- the function ------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "kernels"])
def route(request, monkeypatch):
    """By plain PyTorch, and by the kernels (where there is no GPU, interpreted)."""
    if request.param == "kernels" and not RUNS:
        pytest.skip("Triton is not installed")
    if not ON_GPU:
        monkeypatch.setattr(loss, "has_loss_kernel", lambda hidden: request.param == "kernels")
    elif request.param == "plain":
        monkeypatch.setitem(globals(), "DEVICE", "cpu")
    return request.param


def leaves(*given):
    return [x.detach().clone().requires_grad_() for x in given]


def test_the_function_and_its_gradients(route):
    hidden, weight, targets = some(60, 80, 32)
    h, w = leaves(hidden.view(3, 20, 32), weight.float())
    value = linear_cross_entropy(h, w, targets.view(3, 20))
    gradients = torch.autograd.grad(value, (h, w))
    assert value.dtype == FP32 and [x.dtype for x in gradients] == [BF16, FP32]
    assert_accurate(
        (value.detach(), gradients[0].flatten(0, 1), gradients[1]), hidden, weight, targets
    )


def test_what_comes_from_above_multiplies_the_gradients(route):
    hidden, weight, targets = some(30, 40, 16)
    h, w = leaves(hidden, weight.float())
    value = linear_cross_entropy(h, w, targets)
    once = torch.autograd.grad(value, (h, w), retain_graph=True)
    again = torch.autograd.grad(4 * value, (h, w))
    assert all(torch.equal(4 * a, b) for a, b in zip(once, again, strict=True))


def test_only_what_needs_a_gradient_gets_one(route):
    hidden, weight, targets = some(30, 40, 16)
    (w,) = leaves(weight)
    linear_cross_entropy(hidden, w, targets).backward()
    assert w.grad.dtype == BF16 and hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, w, targets).requires_grad


def test_a_gradient_of_the_gradient_is_refused(route):
    hidden, weight, targets = some(30, 40, 16)
    h, w = leaves(hidden, weight.float())
    (dw,) = torch.autograd.grad(linear_cross_entropy(h, w, targets), [w], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(dw.sum(), (h, w))


def test_second_derivatives_are_refused_and_not_zero(route):
    hidden, weight, targets = some(8, 40, 16)
    function = lambda h: linear_cross_entropy(h, weight, targets)  # noqa: E731
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.functional.hessian(function, hidden)


def test_one_state_without_a_batch(route):
    hidden, weight, targets = some(4, 40, 16)
    one = linear_cross_entropy(hidden[0], weight, targets[0])
    assert torch.equal(one, linear_cross_entropy(hidden[:1], weight, targets[:1]))


def test_small_gradients_of_float16_survive_a_scaled_loss():
    hidden, weight, targets = (x.cpu() for x in some(4096, 300, 16, FP16, 0.05))
    h, w = leaves(hidden, weight)
    gradients = torch.autograd.grad(65536 * linear_cross_entropy(h, w, targets), (h, w))
    right = formula(hidden.double(), weight.double(), targets)[1:]
    for found, exact in zip(gradients, right, strict=True):
        assert (found.double() / 65536 - exact).norm() <= 2e-3 * exact.norm()


def test_gradients_by_differences():
    hidden, weight, targets = (x.cpu() for x in some(6, 9, 4, FP64))
    targets[2] = IGNORE
    function = lambda h, w: linear_cross_entropy(h, w, targets)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves(hidden, weight))


def test_under_autocast_it_computes_in_the_low_type(route):
    hidden, weight, targets = some(60, 80, 32)
    h, w = leaves(hidden.float(), weight.float())
    with torch.autocast(DEVICE, dtype=BF16):
        value = linear_cross_entropy(h, w, targets)
    gradients = torch.autograd.grad(value, (h, w))
    assert [x.dtype for x in gradients] == [FP32, FP32]
    assert_accurate((value.detach(), *gradients), hidden, weight, targets)


def test_compiled_as_one_graph(route):
    torch.compiler.reset()
    compiler = "inductor" if DEVICE == "cuda" else "aot_eager"  # which compiles no C++

    def head(h, w, t):
        return 2 * linear_cross_entropy(h * 2, w, t)

    hidden, weight, targets = some(60, 80, 32)
    results = []
    for function in (head, torch.compile(head, fullgraph=True, backend=compiler)):
        h, w = leaves(hidden, weight.float())
        value = function(h, w, targets)
        results.append((value, *torch.autograd.grad(value, (h, w))))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one.float(), two.float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("grads", [True, False])
def test_the_operator_is_what_it_says(grads):
    hidden, weight, targets = some(20, 30, 8, FP32)
    given = leaves(hidden, weight) if grads else (hidden, weight)
    torch.library.opcheck(loss.linear_loss, (*given, targets, IGNORE, grads))


@on_gpu
def test_recorded_as_a_graph():
    hidden, weight, targets = some(500, 3000, 256)
    h, w = leaves(hidden, weight.float())
    right = linear_cross_entropy(h, w, targets).detach()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(linear_cross_entropy(h, w, targets), (h, w))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        value = linear_cross_entropy(h, w, targets)
        gradients = torch.autograd.grad(value, (h, w))
    graph.replay()
    assert torch.equal(value, right)
    assert_accurate((value.detach(), *gradients), hidden, weight, targets)
    targets[3] = 3000
    graph.replay()
    assert value.isnan()


def test_the_loss_of_a_model_is_that_of_its_logits():
    model = Transformer(ModelConfig(vocab_size=50, n_layer=1, d_model=32, d_ff=32, max_seq_len=16))
    ids = torch.randint(50, (3, 12))
    logits = model(ids[:, :-1])
    right = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    weights = list(model.parameters())
    pairs = [torch.autograd.grad(x, weights) for x in (model.loss(ids[:, :-1], ids[:, 1:]), right)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*pairs, strict=True))


# ---- what is refused ---------------------------------------------------------------------------

H, W, T = torch.ones(6, 16), torch.ones(9, 16), torch.zeros(6, dtype=torch.int64)
REFUSED = {
    "hidden must be (..., D) and weight (V, D), not (6, 16) and (9, 15)": (H, W[:, 1:], T),
    "not (6, 16) and (9,)": (H, W[:, 0], T),
    "one target for each row of hidden, not (5,) for hidden (6, 16)": (H, W, T[1:]),
    "not (0,) for hidden (0, 16)": (H[:0], W, T[:0]),
    "targets must be int64, hidden and weight floating point, not torch.int32": (H, W, T.int()),
    "torch.int64 and torch.float32": (H.long(), W, T),
    "on one device, not cpu, meta and cpu": (H, W.to("meta"), T),
    "1 targets are not in 0..8, for example 9": (H, W, T.index_fill(0, torch.tensor(2), 9)),
    "6 targets are not in 0..8, for example -1": (H, W, T - 1),
    "no target is left: all 6 are ignore_index -100": (H, W, T - 100),
}


@pytest.mark.parametrize("says", REFUSED)
def test_bad_input_is_one_clear_error(says):
    with pytest.raises(ValueError) as caught:
        linear_cross_entropy(*REFUSED[says])
    assert says in str(caught.value) and "\n" not in str(caught.value)


PLAIN = """
    import torch
    from nanolm import linear_cross_entropy

    h, w = torch.zeros(5, 4, requires_grad=True), torch.zeros(8, 4)
    loss = linear_cross_entropy(h, w, torch.arange(5))
    loss.backward()
    print(round(loss.item(), 4), h.grad.any().item())
"""


def test_without_triton_plain_pytorch_does_it():
    assert python(NO_TRITON + PLAIN, CUDA_VISIBLE_DEVICES="") == f"{round(math.log(8), 4)} False\n"


@with_kernels
def test_a_target_that_is_no_word_spoils_all_gradients():
    x, w = torch.randn(70, 32).to(DEVICE, BF16), torch.randn(90, 32).to(DEVICE, BF16)
    t = torch.randint(90, (70,)).to(DEVICE)
    t[3], t[5] = 90, -100
    value, d_x, d_w = loss.launch_loss(x, w, t, -100, True)
    assert value.isnan() and d_x[:5].isnan().all() and d_w.isnan().all()


def test_gluon_is_for_hopper_cards_that_have_all_of_it(monkeypatch):
    x = torch.empty(3, 64, dtype=BF16)
    monkeypatch.setattr(loss, "interpreting", lambda: False)
    assert not loss.can_at_once(x)  # on a CPU
    monkeypatch.setattr(loss, "is_hopper", lambda _: True)
    assert loss.can_at_once(x) == has_triton() and not loss.can_at_once(x[:, :48])
    for other in (Missing("hopper"), SimpleNamespace(mbarrier=None)):  # none, and Triton 3.4's
        monkeypatch.setattr(loss, "hopper", other)
        assert not loss.can_at_once(x)
    monkeypatch.undo()
    monkeypatch.setattr(loss, "is_hopper", lambda _: True)
    monkeypatch.setattr(loss, "has_triton", lambda: False)
    assert not loss.can_at_once(x)


# ---- compiled for cards that are not here ------------------------------------------------------


@with_kernels
def test_kernels_fit_the_cards_and_spill_nothing():
    rows = compiled_rows("loss_gate")
    assert len(rows) == 4 * (3 * 4 + 3) + 2 * 4  # without gradients there is nothing to scale
    assert sum(row["kernel"] == "weigh_at_once_kernel" for row in rows) == 2
    for row in rows:
        card = int(row["case"].partition("-")[0].removeprefix("sm_"))
        assert row["shared"] <= SHARED[card] * 1024 and row["stack"] == 0, row
        assert row["tensor_cores"] > 0 or row["kernel"] in ("guess_kernel", "scale_kernel"), row
