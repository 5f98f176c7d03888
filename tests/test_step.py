"""The recorded step against the plain one, which test_train.py holds to the paper."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from seeded import one_seed  # noqa: F401

import nanolm.step as step_module
from nanolm.checkpoint import pack_optimizer, unpack_optimizer
from nanolm.model import ModelConfig, Transformer
from nanolm.optim import AdamW, clip_grad_norm, decay_groups
from nanolm.step import GraphedStep, joined, side_by_side
from nanolm.train import accumulate

CONFIG = ModelConfig(vocab_size=61, n_layer=2, d_model=32, n_head=2, d_ff=40, max_seq_len=12)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def micro_batches(count=1, rows=4, device="cpu"):
    ids = torch.randint(CONFIG.vocab_size, (count, rows, 13)).to(device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]


def pair(lr=1e-2, device="cpu"):
    """Two equal models, each with its optimizer."""
    model = Transformer(CONFIG).to(device)
    models = model, copy.deepcopy(model)
    return [(one, AdamW(decay_groups(one, 0.1), lr=lr)) for one in models]


def plain_step(model, optimizer, micro, limit):
    optimizer.zero_grad()
    loss = accumulate(model.loss, micro, len(micro))
    norm = clip_grad_norm(model.parameters(), limit or float("inf"))
    optimizer.step()
    return loss, norm


def exact(model, optimizer, **options):
    """A step in float32: what it computes is what the plain one does."""
    return GraphedStep(model, optimizer, dtype=torch.float32, **options)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("limit", [0, 0.3, 100.0])
def test_in_float32_it_is_the_plain_step(count, limit):
    (one, plain), (two, optimizer) = pair()
    step = exact(two, optimizer, grad_accum=count, grad_clip=limit)
    start = [weight.detach().clone() for weight in one.parameters()]
    for t in range(4):
        for group in (*plain.param_groups, *optimizer.param_groups):
            group["lr"] = 1e-2 / (t + 1)
        micro = micro_batches(count)
        for a, b in zip(plain_step(one, plain, micro, limit), step(micro), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
    for a, b, c in zip(one.parameters(), two.parameters(), start, strict=True):
        assert (a - b).norm() <= 1e-3 * (a - c).norm()
    states = pack_optimizer(one, plain), pack_optimizer(two, optimizer)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name


def test_parameters_and_state_become_views_with_the_same_values():
    ((model, optimizer), _) = pair()
    plain_step(model, optimizer, micro_batches(), 1.0)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(pack_optimizer(model, optimizer))
    step = exact(model, optimizer)
    after = model.state_dict(), pack_optimizer(model, optimizer)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    row = step.rows[0].weight
    row.fill_(7)
    assert model.embedding.weight.unique().tolist() == [7]
    assert not (model.norm.weight == 7).any()  # in the row that does not decay


def test_the_low_copy_is_the_rounded_master():
    ((model, optimizer), _) = pair()
    step = GraphedStep(model, optimizer)
    for _ in range(3):
        step(micro_batches())
        for rows in step.rows:
            assert torch.equal(rows.weight.to(rows.low.dtype), rows.low)
        assert [rows.low.dtype for rows in step.rows] == [torch.bfloat16, torch.float32]


def test_in_bfloat16_it_learns_what_the_plain_step_learns():
    (one, plain), (two, optimizer) = pair()
    step, micro = GraphedStep(two, optimizer), micro_batches()
    for _ in range(25):
        loss, _ = plain_step(one, plain, micro, 1.0)
        low, _ = step(micro)
    assert loss < 1.0 and abs(low - loss) < 0.1


def test_interrupted_and_resumed_bit_for_bit():
    (one, first), (two, second) = pair()
    batches = [micro_batches() for _ in range(6)]
    step = GraphedStep(one, first)
    for micro in batches:
        step(micro)
    step = GraphedStep(two, second)
    for micro in batches[:3]:
        step(micro)
    weights = {name: x.clone() for name, x in two.state_dict().items()}
    moments = {name: x.clone() for name, x in pack_optimizer(two, second).items()}
    again = Transformer(CONFIG)
    again.load_state_dict(weights)
    third = AdamW(decay_groups(again, 0.1), lr=1e-2)
    unpack_optimizer(again, third, moments)
    step = GraphedStep(again, third)
    for micro in batches[3:]:
        step(micro)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_refused_batch_changes_nothing():
    ((model, optimizer), _) = pair()
    step = exact(model, optimizer, grad_accum=2)
    (x, y), good = micro_batches()[0], micro_batches(2)
    step(good)
    before = copy.deepcopy(pack_optimizer(model, optimizer))
    for bad in (
        [], [(x, y)], [(x, y)] * 3, [(x, y), (x[:1], y[:1])], [(x, y[:, :1]), (x, y)],
        [(x, y.float()), (x, y)], [(x + 61, y), (x, y)], [(x, y + 61), (x, y)],
    ):  # fmt: skip
        with pytest.raises(ValueError):
            step(bad)
    after = pack_optimizer(model, optimizer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    step(good)


def test_a_frozen_parameter_is_refused():
    ((model, _), _) = pair()
    model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters of the model"):
        exact(model, AdamW(decay_groups(model, 0.1)))


def test_what_cannot_be_stepped_is_refused():
    (model, optimizer), (other, _) = pair()
    for options in ({"grad_clip": -1.0}, {"grad_clip": float("nan")}, {"grad_accum": 0}):
        with pytest.raises(ValueError, match="grad_clip of 0 or more"):
            exact(model, optimizer, **options)
    with pytest.raises(ValueError, match="nanolm's AdamW"):
        exact(model, torch.optim.AdamW(model.parameters()))
    for wrong in (other, copy.deepcopy(model).double()):
        with pytest.raises(ValueError, match="of this model"):
            exact(wrong if wrong is not other else model, AdamW(decay_groups(wrong, 0.1)))
    optimizer.state[model.embedding.weight].update(step=torch.tensor(3.0))
    with pytest.raises(ValueError, match="unequal numbers of steps"):
        exact(model, optimizer)


def test_a_copy_or_a_second_owner_says_so():
    ((model, optimizer), _) = pair()
    first = exact(model, optimizer)
    with pytest.raises(RuntimeError, match="build a new one"):
        copy.deepcopy(first)(micro_batches())
    first(micro_batches())
    second = exact(model, optimizer)
    with pytest.raises(RuntimeError, match="build a new one"):
        first(micro_batches())
    second(micro_batches())


def test_moments_that_were_replaced_are_noticed():
    ((model, optimizer), _) = pair()
    step = exact(model, optimizer)
    step(micro_batches())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="loaded"):
        step(micro_batches())


def test_an_optimizer_that_is_refused_moves_nothing():
    ((model, optimizer), _) = pair()
    step = exact(model, optimizer)
    with pytest.raises(ValueError, match="all parameters"):
        exact(model, AdamW(list(model.parameters())[:-1]))
    step(micro_batches())


def test_ids_of_another_shape_are_refused():
    ((model, optimizer), _) = pair()
    step = exact(model, optimizer)
    for shape in ((5,), (1, 2, 5), (0, 5), (2, 0), (1, 13)):
        with pytest.raises(ValueError, match="ids must have shape"):
            step.loss(*torch.zeros(2, *shape, dtype=torch.int64))


def test_a_recording_that_fails_puts_everything_back(monkeypatch):
    ((model, optimizer), _) = pair()
    made = exact(model, optimizer)
    made(micro_batches())
    before = copy.deepcopy(pack_optimizer(model, optimizer)), copy.deepcopy(model.state_dict())

    def failing(function):
        function()
        raise MemoryError

    monkeypatch.setattr(step_module, "record", failing)
    made.take(micro_batches())
    made.prepare()
    with pytest.raises(MemoryError):
        made.replay()
    after = pack_optimizer(model, optimizer), model.state_dict()
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_options_that_change_are_recorded_anew(monkeypatch):
    class Graph:
        def __init__(self, function):
            self.replay = function

    def recording(function):
        recorded.append(function)
        found = [torch.zeros(()), torch.zeros(())]
        return Graph(lambda: [a.copy_(b) for a, b in zip(found, function(), strict=True)]), found

    recorded = []
    monkeypatch.setattr(step_module, "record", recording)
    ((model, optimizer), _) = pair()
    made = exact(model, optimizer)
    for weight_decay in (0.1, 0.1, 0.3):
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        made.take(micro_batches())
        made.prepare()
        loss, _ = made.replay()
        assert loss > 0
    assert len(recorded) == 2


@pytest.mark.parametrize("latch", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(latch):
    ((model, optimizer), _) = pair()
    step, (good, bad) = exact(model, optimizer, latch=latch), (micro_batches(), micro_batches())
    step(good)
    before = copy.deepcopy(pack_optimizer(model, optimizer)), copy.deepcopy(model.state_dict())
    kept = step.passes.layers[0].mlp_norm.clone()
    step.passes.layers[0].mlp_norm[0] = float("inf")
    _, norm = step(bad)
    step.passes.layers[0].mlp_norm.copy_(kept)
    assert not norm.isfinite()

    def changed():
        after = pack_optimizer(model, optimizer), model.state_dict()
        return [
            name
            for old, new in zip(before, after, strict=True)
            for name in old
            if not name.endswith("/step") and not torch.equal(old[name], new[name])
        ]

    assert not changed()
    _, norm = step(good)
    assert norm.isfinite() and bool(changed()) is not latch


def test_validation_is_the_loss_of_the_low_copy():
    ((model, optimizer), _) = pair()
    step = GraphedStep(model, optimizer)
    (batch,) = micro_batches()
    assert torch.equal(step.loss(*batch), step.passes.loss(*batch))
    assert not step.loss(*batch).requires_grad


def test_parts_that_do_not_lie_one_below_the_other_are_refused():
    _, (a, b, c) = side_by_side([torch.full((n, 2), float(n)) for n in (3, 1, 2)], torch.float32)
    assert joined([a, b, c]).tolist() == [[3, 3]] * 3 + [[1, 1]] + [[2, 2]] * 2
    for parts in ([a, c], [b, a], [a.T]):
        with pytest.raises(ValueError, match="in the model's order"):
            joined(parts)


def test_the_models_order_is_wanted():
    ((model, _), _) = pair()
    with pytest.raises(ValueError, match="in the model's order"):
        exact(model, AdamW(list(model.parameters())[::-1]))
    exact(model, AdamW(model.parameters()))


def test_groups_without_parameters_are_left_out():
    ((model, _), _) = pair()
    step = exact(model, AdamW([{"params": []}, *decay_groups(model, 0.1), {"params": []}]))
    assert len(step.rows) == 2
    step(micro_batches())


def test_what_reduces_the_gradients_is_asked_once_and_obeyed():
    ((one, plain), (two, optimizer)) = pair()
    seen = []

    def double(grads):
        seen.append(len(grads))
        torch._foreach_mul_(grads, 2.0)

    micro = micro_batches(3)
    _, norm = exact(one, plain, grad_accum=3, grad_clip=0)(micro)
    _, doubled = exact(two, optimizer, grad_accum=3, grad_clip=0, reduce=double)(micro)
    assert seen == [2] and torch.allclose(doubled, 2 * norm)


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 2}, {"d_model": 36, "d_ff": 7}])
def test_the_gradients_are_autograds(shape):
    config = replace(CONFIG, **{"n_kv_head": 1, "n_head": 2} | shape)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # also the norms
    ((ids, targets),) = micro_batches()
    right = torch.autograd.grad(model.loss(ids, targets), list(model.parameters()))
    step = exact(model, AdamW(model.parameters()))
    with torch.no_grad():
        step.passes(ids, targets)
    for (name, _), exactly in zip(model.named_parameters(), right, strict=True):
        found = step.passes.place_of[name]
        assert (found - exactly).norm() <= 1e-5 * exactly.norm(), name


def test_a_layer_that_nobody_takes_is_not_kept():
    ((model, optimizer), _) = pair()
    passes, seen = exact(model, optimizer).passes, []
    ((ids, _),) = micro_batches()
    with torch.no_grad():
        passes.there(ids, lambda was: seen.extend(map(weakref.ref, was)))
    assert len(seen) == 11 * model.config.n_layer
    assert not any(ref() is not None for ref in seen[:-11])


@on_gpu
@pytest.mark.parametrize("shape", [{}, {"d_ff": 96}, {"d_model": 192, "n_head": 6}])
def test_on_a_gpu_in_bfloat16_the_gradients_are_as_near_as_pytorchs(shape):
    config = replace(ModelConfig(vocab_size=500, n_layer=3, max_seq_len=80), **shape)
    model = Transformer(config).cuda()
    ids = torch.randint(500, (5, 78), device="cuda")
    given = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    wide, low = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
    right, plain = (torch.autograd.grad(m.loss(*given), list(m.parameters())) for m in (wide, low))
    step = GraphedStep(model, AdamW(model.parameters()))
    with torch.no_grad():
        step.passes(*given)
    for (name, _), theirs, exactly in zip(model.named_parameters(), plain, right, strict=True):
        error = (step.passes.place_of[name] - exactly).norm()
        assert error <= 2 * (theirs - exactly).norm() + 1e-6 * exactly.norm(), name


class InTurn:
    """A `Beside` that has no stream of its own."""

    def __init__(self, stream):
        self.stream, self.held = torch.cuda.current_stream(), []

    def follow(self):
        pass

    join = follow


@on_gpu
@pytest.mark.parametrize("alive", [2**18, 2**30])
def test_a_product_beside_the_way_back_gives_the_same_bits(monkeypatch, alive):
    monkeypatch.setattr(step_module, "ALIVE", alive)  # several chunks, and one
    config = ModelConfig(vocab_size=2000, n_layer=3, max_seq_len=80)
    torch.manual_seed(0)
    model, ids = Transformer(config).cuda(), torch.randint(2000, (2, 8, 81), device="cuda")
    micro = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]
    found = []
    for beside in (step_module.Beside, InTurn):
        monkeypatch.setattr(step_module, "Beside", beside)
        one = copy.deepcopy(model)
        step = GraphedStep(one, AdamW(decay_groups(one, 0.1), lr=1e-3), grad_accum=2)
        losses = [step(micro)[0] for _ in range(5)]
        found.append(torch.cat([*map(torch.atleast_1d, losses), one.embedding.weight.flatten()]))
    assert torch.equal(*found)


@on_gpu
def test_the_same_bits_if_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            ((model, optimizer), _) = pair(device="cuda")
            step = GraphedStep(model, optimizer)
            for _ in range(5):
                step(micro_batches(rows=64, device="cuda"))
            found.append(model.embedding.weight.clone())
        assert torch.equal(*found)
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
def test_recorded_it_learns_the_same():
    (one, plain), (two, optimizer) = pair(device="cuda")
    step, micro = GraphedStep(two, optimizer, grad_accum=2), micro_batches(2, device="cuda")
    for t in range(25):
        loss, norm = plain_step(one, plain, micro, 1.0)
        low, low_norm = step(micro)
        if t == 0:
            assert torch.allclose(loss, low, rtol=1e-2) and torch.allclose(
                norm, low_norm, rtol=3e-2
            )
    assert loss < 1.0 and abs(low - loss) < 0.1
    assert optimizer.state[two.norm.weight]["step"].item() == 25
    value = step.loss(*micro[0])
    assert torch.allclose(value, step.passes.loss(*micro[0]), rtol=1e-2)
