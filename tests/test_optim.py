"""The optimizer against torch's own, the schedule against its closed form, the clipping."""

import math

import pytest
import torch
from torch import nn

from nanolm.optim import AdamW, clip_grad_norm, decay_groups, warmup_cosine


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 5)).to(dtype)


def gradients(model, seed):
    """The same pseudo-random gradients for every model, of very unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(model.parameters()):
        scale = 10.0 ** (i - 3)
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def assert_same(ours, theirs, ulps):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        bound = ulps * torch.finfo(a.dtype).eps
        assert torch.allclose(a, b, rtol=bound, atol=bound), (a - b).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_step_by_step_with_groups_and_a_changing_rate(dtype, foreach, decay):
    a, b = net(dtype), net(dtype)
    betas, eps = (0.9, 0.95), 1e-8
    ours = AdamW(decay_groups(a, decay), lr=1e-3, betas=betas, eps=eps)
    theirs = torch.optim.AdamW(
        decay_groups(b, decay), lr=1e-3, betas=betas, eps=eps, foreach=foreach
    )
    for step in range(300):
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, peak=3e-2, warmup=20, total=300)
        gradients(a, step)
        gradients(b, step)
        ours.step()
        theirs.step()
        assert_same(a, b, ulps=4)


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [AdamW, torch.optim.AdamW])
def test_state_dict_travels_between_the_two(first, second):
    straight, broken = net(), net()
    options = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    whole = torch.optim.AdamW(straight.parameters(), **options)
    part = first(broken.parameters(), **options)
    for step in range(10):
        gradients(straight, step)
        whole.step()
    for step in range(5):
        gradients(broken, step)
        part.step()
    resumed = second(broken.parameters(), lr=9.0)  # the saved options win
    resumed.load_state_dict(part.state_dict())
    for step in range(5, 10):
        gradients(broken, step)
        resumed.step()
    assert_same(straight, broken, ulps=4)
    ours, theirs = resumed.state_dict()["state"], whole.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i in ours:
        assert ours[i].keys() == theirs[i].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert ours[i]["step"] == theirs[i]["step"] == 10


def test_a_parameter_without_gradient_is_left_alone_and_counts_its_own_steps():
    a, b = net(), net()
    ours, theirs = (
        AdamW(a.parameters()),
        torch.optim.AdamW(b.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    )
    for step in range(6):
        for model, optimizer in ((a, ours), (b, theirs)):
            gradients(model, step)
            if step % 2:
                model[0].weight.grad = None
            optimizer.step()
    assert_same(a, b, ulps=4)
    assert ours.state[a[0].weight]["step"] == 3


def test_no_gradient_at_all_changes_nothing():
    a, b = net(), net()
    AdamW(a.parameters()).step()
    assert_same(a, b, ulps=0)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert abs(p.item() - 0.9) < 1e-6


@pytest.mark.parametrize(
    "option",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"eps": -1e-8},
        {"weight_decay": math.inf},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
    ],
)
def test_bad_options_are_one_line(option):
    with pytest.raises(ValueError) as error:
        AdamW(net().parameters(), **option)
    assert "\n" not in str(error.value) and next(iter(option)) in str(error.value)
    with pytest.raises(ValueError):
        AdamW([{"params": list(net().parameters()), **option}])


def test_decay_groups_cover_each_parameter_once():
    model = net()
    model.tied = nn.Linear(7, 11, bias=False)
    model.tied.weight = model[0].weight
    model[3].bias.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in kept["params"]] == [1, 1, 1] and kept["weight_decay"] == 0.0
    assert AdamW(decay_groups(nn.Linear(2, 3, bias=False), 0.1)).param_groups[1]["params"] == []


def test_schedule_ends_and_corners():

    def at(step, **options):
        return warmup_cosine(step, peak=2.0, total=1000, **options)

    assert at(0) == 2.0 / 200
    assert at(199) == 2.0
    assert at(999) == pytest.approx(0.2, abs=1e-15) and at(5000) == at(999)
    middle = (199 + 999) // 2
    assert at(middle) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    rates = [at(s) for s in range(1000)]
    assert rates.count(2.0) == 1  # one step at the peak
    assert all(a < b for a, b in zip(rates[:199], rates[1:200], strict=True))
    assert all(a > b for a, b in zip(rates[199:-1], rates[200:], strict=True))
    assert at(0, warmup=0) == at(0, warmup=1) == 2.0
    assert at(999, warmup=999, floor=0.25) == 0.5
    assert warmup_cosine(0, peak=1.0, warmup=0, total=1) == 1.0
    assert warmup_cosine(5, peak=1.0, warmup=0, total=10, floor=1.0) == 1.0


@pytest.mark.parametrize("warmup, total", [(1, 2), (1, 9), (8, 9), (200, 1000)])
def test_schedule_is_the_equation_at_every_step(warmup, total):
    for s in range(total):
        u = (s - (warmup - 1)) / ((total - 1) - (warmup - 1))
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * u)) / 2
        expected = (s + 1) / warmup if s < warmup else cosine
        assert warmup_cosine(s, peak=1.0, warmup=warmup, total=total) == pytest.approx(expected)
        if warmup == 1:
            assert warmup_cosine(s, peak=1.0, warmup=0, total=total) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, options",
    [
        (-1, {}),
        (0, {"warmup": 1000}),
        (0, {"warmup": -1}),
        (0, {"peak": -1.0}),
        (0, {"peak": math.nan}),
        (0, {"floor": 1.5}),
    ],
)
def test_schedule_refuses_in_one_line(step, options):
    with pytest.raises(ValueError) as error:
        warmup_cosine(step, **{"peak": 1.0, "total": 1000, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9, math.inf])
def test_clip_equals_torch(max_norm):
    a, b = net(), net()
    gradients(a, 0)
    gradients(b, 0)
    norm = clip_grad_norm(a.parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(b.parameters(), max_norm)
    assert torch.allclose(norm, expected, rtol=1e-6)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_the_gradients_kept(bad):
    model = net()
    gradients(model, 0)
    model[0].weight.grad[2, 3] = bad
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_grad_norm(model.parameters(), 1.0)
    assert not norm.isfinite()
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0))


def test_clip_without_gradients_or_with_a_bad_bound():
    assert clip_grad_norm(net().parameters(), 1.0) == 0
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clip_grad_norm(net().parameters(), bound)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_torch_agrees():
    a, b = net().cuda(), net().cuda()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = AdamW(a.parameters(), **options)
    theirs = torch.optim.AdamW(b.parameters(), **options)
    for step in range(50):
        for model in (a, b):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator(device="cuda").manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        theirs.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            clip_grad_norm(a.parameters(), 1.0)
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(a, b, ulps=16)
