"""The model against Llama of transformers, against naive float64 and against itself."""

import copy
import dataclasses
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import one_seed  # noqa: F401

from nanolm.model import (
    PRESETS,
    Attention,
    Block,
    KVCache,
    ModelConfig,
    RMSNorm,
    SwiGLU,
    Transformer,
    apply_rotary,
    attention,
    flops_per_token,
    init_weights,
    parameter_ledger,
    rotary_tables,
)

TINY = ModelConfig(
    vocab_size=67, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=44, max_seq_len=48
)


def loud(config, dtype=torch.float64):
    """A model whose weights are large enough that every part of it matters to the logits."""
    model = Transformer(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model


def some_ids(config, *shape):
    return torch.randint(config.vocab_size, shape)


# -- the same weights in Llama ------------------------------------------------------------------


def llama(model):
    """The Llama of transformers with the weights of `model`, in its dtype."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    new = int(transformers.__version__.split(".")[0]) >= 5
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        attn_implementation="eager",
        **({"rope_parameters": rope} if new else {"rope_theta": c.rope_theta}),
    )
    theirs = transformers.LlamaForCausalLM(config).to(model.embedding.weight.dtype)
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "blocks.": "model.layers.",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn.": "self_attn.",
        "norm.weight": "model.norm.weight",
    }

    def rename(name):
        if name == "norm.weight":
            return names[name]
        for ours, other in list(names.items())[:-1]:
            name = name.replace(ours, other)
        return name

    renamed = {rename(name): weight for name, weight in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    return theirs, rename


@pytest.mark.parametrize("n_head, n_kv_head", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_logits_loss_and_gradients_equal_llama(n_head, n_kv_head, theta):
    config = dataclasses.replace(
        TINY, n_head=n_head, n_kv_head=n_kv_head, d_model=8 * n_head, rope_theta=theta, n_layer=3
    )
    ours = loud(config)
    theirs, rename = llama(ours)
    ids = some_ids(config, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    loss = ours.loss(ids[:, :-1], ids[:, 1:])
    expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        other = gradients[rename(name)]
        assert (p.grad - other).norm() <= 1e-4 * other.norm(), name


# -- rope ---------------------------------------------------------------------------------------


def test_rms_norm_is_its_formula():
    norm = RMSNorm(24, eps=0.1).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_large_bfloat16_does_not_overflow_or_drift():
    x = torch.randn(7, 256).mul(1e4).bfloat16()
    expected = torch.nn.functional.rms_norm(x.double(), (256,), eps=1e-5)
    torch.testing.assert_close(RMSNorm(256).bfloat16()(x).double(), expected, rtol=2**-7, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    half=st.integers(1, 32),
    m=st.integers(0, 200),
    n=st.integers(0, 200),
    shift=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_scores_depend_on_the_distance_only(half, m, n, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=generator).double().unbind(0)
    cos, sin = rotary_tables(512, 2 * half)

    def score(i, j):
        at = [apply_rotary(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, i), (k, j))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), rtol=1e-4, atol=2e-3)


def test_rotary_keeps_norms_dtype_and_position_zero():
    cos, sin = rotary_tables(9, 10)
    x = torch.randn(2, 3, 9, 10)
    y = apply_rotary(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, :, 0], x[:, :, 0])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert apply_rotary(x.to(dtype), cos, sin).dtype == dtype


def test_odd_heads_cannot_be_rotated():
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        rotary_tables(4, 7)


# -- attention ----------------------------------------------------------------------------------


def naive_attention(q, k, v, causal, scale=None):
    """One query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group, T, S = q.size(1) // k.size(1), q.size(2), k.size(2)
    out = torch.zeros_like(q)
    for h in range(q.size(1)):
        for t in range(T):
            end = t + S - T + 1 if causal else S
            keys, values = k[:, h // group, :end], v[:, h // group, :end]
            scores = (keys @ q[:, h, t, :, None])[..., 0] * (scale or q.size(-1) ** -0.5)
            out[:, h, t] = (scores.softmax(-1)[:, None] @ values)[:, 0]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "T, S", [(1, 1), (1, 7), (2, 63), (7, 7), (63, 64), (33, 65), (65, 65), (3, 129), (23, 97)]
)
def test_attention_equals_naive(T, S, heads, causal):
    q = torch.randn(2, heads[0], T, 24, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, heads[1], S, 24, dtype=torch.float64, requires_grad=True) for _ in "kv")
    out, expected = attention(q, k, v, causal=causal), naive_attention(q, k, v, causal)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        attention(q.float(), k.float(), v.float(), causal=causal).double(),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


def test_attention_scale():
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    expected = naive_attention(q, k, v, True, scale=0.7)
    torch.testing.assert_close(attention(q, k, v, scale=0.7), expected)


def test_groups_equal_repeated_keys():
    q = torch.randn(2, 8, 11, 16)
    for n_kv_head in (1, 2, 4, 8):
        k, v = torch.randn(2, 2, n_kv_head, 11, 16).unbind(0)
        repeated = (x.repeat_interleave(8 // n_kv_head, dim=1) for x in (k, v))
        torch.testing.assert_close(attention(q, k, v), attention(q, *repeated))


def test_attention_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        attention(torch.ones(1, 6, 2, 4), torch.ones(1, 4, 2, 4), torch.ones(1, 4, 2, 4))
    with pytest.raises(ValueError, match="3 queries, 2 keys"):
        attention(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 2, 4)
    assert attention(q, k, k, causal=False).shape == q.shape  # no order, no objection


# -- the cache ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12), batch=st.integers(1, 3))
def test_any_pieces_through_the_cache_equal_the_whole(sizes, batch):
    while sum(sizes) > TINY.max_seq_len:
        sizes.pop()
    model, ids = loud(TINY), some_ids(TINY, batch, sum(sizes))
    cache = model.new_cache(batch)
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(ids), rtol=1e-9, atol=1e-9)
    assert cache.length == sum(sizes)


def test_prompt_of_every_length_then_one_at_a_time():
    model, ids = loud(TINY, torch.float32).eval(), some_ids(TINY, 1, TINY.max_seq_len)
    with torch.no_grad():
        whole = model(ids)
        for prompt in range(1, TINY.max_seq_len + 1, 3):
            cache = model.new_cache(1)
            logits = [model(ids[:, :prompt], cache)]
            logits += [model(ids[:, t : t + 1], cache) for t in range(prompt, TINY.max_seq_len)]
            torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-3, atol=2e-3)


def test_a_failed_call_leaves_the_cache_as_it_was():
    model, ids = loud(TINY), some_ids(TINY, 1, TINY.max_seq_len)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids[:, :40], cache)
        with pytest.raises(ValueError, match="49 tokens are more than max_seq_len 48"):
            model(ids[:, :9], cache)
        assert cache.length == 40
        torch.testing.assert_close(model(ids[:, 40:], cache), model(ids)[:, 40:])


def test_cache_refuses_another_batch_and_too_much():
    cache = KVCache(1, 2, 1, 4, 8)
    with pytest.raises(ValueError, match="room for 2 sequences of 4 positions, not 1 of 3"):
        cache.update(0, torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))
    with pytest.raises(ValueError, match="not 2 of 5"):
        cache.update(0, torch.ones(2, 1, 5, 8), torch.ones(2, 1, 5, 8))


def test_cache_has_the_models_dtype_and_the_groups_size():
    model = Transformer(TINY).bfloat16()
    cache = model.new_cache(3)
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 48, 8)
    assert cache.keys.dtype == torch.bfloat16 and cache.length == 0
    assert model(some_ids(TINY, 3, 5), cache).shape == (3, 5, 67)


# -- the model ----------------------------------------------------------------------------------


def test_default_has_10_358_016_parameters():
    model = Transformer(ModelConfig())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == 10_358_016
    ledger = parameter_ledger(ModelConfig())
    assert sum(ledger.values()) == 10_358_016
    assert round(100 * ledger["embedding and head"] / 10_358_016) == 79


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_their_ledgers_add_up(name):
    config = ModelConfig.preset(name)
    assert sum(parameter_ledger(config).values()) == Transformer(config).num_parameters()
    assert 500_000 < Transformer(ModelConfig.preset("pocket")).num_parameters() < 2_000_000


def test_flops_grow_by_attention_alone():
    config = ModelConfig()
    longer = flops_per_token(config, 1024) - flops_per_token(config, 512)
    assert longer == 6 * 6 * 256 * 512
    assert isinstance(flops_per_token(config, 512), int)


def test_config_fields_explain_themselves_and_are_frozen():
    assert all(field.metadata["help"] for field in dataclasses.fields(ModelConfig))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_kv_head": 3}, "n_head must be a multiple of n_kv_head: 8 / 3 leaves 2"),
        ({"d_model": 100}, "d_model must be a multiple of n_head: 100 / 8 leaves 4"),
        ({"d_model": 24, "n_head": 8}, "must be even for rotary positions: 3"),
        ({"vocab_size": 0}, "vocab_size must be positive and finite, not 0"),
        ({"n_layer": -1}, "n_layer must be positive and finite, not -1"),
        ({"n_kv_head": 16}, "n_head must be a multiple of n_kv_head"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive and finite, not nan"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"init_std": float("inf")}, "init_std must be positive and finite, not inf"),
        ({"residual_std": -0.1}, "residual_std must be positive and finite, not -0.1"),
        ({"n_layer": 2.5}, "n_layer must be a whole number, not 2.5"),
        ({"vocab_size": True}, "vocab_size must be a whole number, not True"),
        ({"d_model": "256"}, "d_model must be a whole number, not '256'"),
        ({"rope_theta": None}, "rope_theta must be a number, not None"),
    ],
)
def test_impossible_shapes_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'huge': choose from default, pocket"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[1, 67]]), r"token id 67 is not in 0\.\.66"),
        (torch.tensor([[-1, 3]]), r"token id -1 is not in 0\.\.66"),
        (torch.zeros(1, 49, dtype=torch.long), "49 tokens are more than max_seq_len 48"),
        (torch.tensor([1, 2]), r"shape \(batch, time\), not \(2,\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \(batch, time\), not \(1, 0\)"),
        (torch.zeros(0, 4, dtype=torch.long), r"shape \(batch, time\), not \(0, 4\)"),
        (torch.tensor(3), r"shape \(batch, time\), not \(\)"),
    ],
)
def test_bad_ids_are_one_line(ids, message):
    with pytest.raises(ValueError, match=message):
        Transformer(TINY)(ids)


@pytest.mark.parametrize("std, extra", [(0.02, 0.03), (0.09, 0.52)])
def test_loss_at_birth_is_log_v_and_half_the_variance(std, extra):
    config = dataclasses.replace(ModelConfig.preset("pocket"), init_std=std)
    model, ids = Transformer(config), some_ids(config, 8, 129)
    loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(config.vocab_size) + extra, abs=0.15)


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids, targets = loud(TINY), some_ids(TINY, 3, 20), some_ids(TINY, 3, 20)
    log_p = model(ids).log_softmax(-1)
    expected = -log_p.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model.loss(ids, targets), expected)
    with pytest.raises(ValueError):
        model.loss(ids, targets[:, 1:])


def test_loss_leaves_out_ignored_targets():
    model, ids, targets = loud(TINY), some_ids(TINY, 1, 20), some_ids(TINY, 1, 20)
    masked = targets.clone()
    masked[:, 10:] = -100
    torch.testing.assert_close(model.loss(ids, masked), model.loss(ids[:, :10], targets[:, :10]))


def test_hidden_and_logits_are_the_two_halves_of_forward():
    model, ids = loud(TINY), some_ids(TINY, 2, 9)
    hidden = model.hidden(ids)
    assert hidden.shape == (2, 9, 32)
    torch.testing.assert_close(model.logits(hidden[:, -1]), model(ids)[:, -1])
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


@pytest.mark.parametrize("position", [0, 1, 17, 47])
def test_a_later_token_changes_no_earlier_logit(position):
    model, ids = loud(TINY), some_ids(TINY, 1, 48)
    changed = ids.clone()
    changed[0, position] = (ids[0, position] + 1) % TINY.vocab_size
    moved = (model(ids) != model(changed)).any(-1)[0]
    assert not moved[:position].any() and moved[position:].all()


def test_sequences_of_a_batch_do_not_touch():
    model, ids = loud(TINY), some_ids(TINY, 3, 20)
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]))


def test_every_parameter_gets_a_gradient():
    model = Transformer(TINY)
    model.loss(some_ids(TINY, 2, 20), some_ids(TINY, 2, 20)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_one_batch_is_learned_by_heart():
    model, ids = Transformer(dataclasses.replace(TINY, d_model=64)), some_ids(TINY, 4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_initialisation():
    shape = dataclasses.replace(TINY, n_layer=8, d_model=128, d_ff=256, residual_std=0.005)
    model = Transformer(shape)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            writes = "o_proj" in name or "down_proj" in name
            assert p.std().item() == pytest.approx(0.005 if writes else 0.02, rel=0.05), name
    init_weights(model, 0.03, 0.04)
    assert model.blocks[0].mlp.down_proj.weight.std().item() == pytest.approx(0.04, rel=0.05)
    assert model.blocks[0].mlp.up_proj.weight.std().item() == pytest.approx(0.03, rel=0.05)
    ruled = Transformer(dataclasses.replace(shape, residual_std=0.0))
    assert ruled.blocks[0].attn.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)


def test_state_dict_is_the_parameters_and_nothing_else():
    model = Transformer(TINY)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other = Transformer(TINY)
    other.load_state_dict(model.state_dict())
    ids = some_ids(TINY, 1, 9)
    assert torch.equal(model(ids), other(ids)) and torch.equal(
        copy.deepcopy(model)(ids), other(ids)
    )


# -- precision and compilation ------------------------------------------------------------------


@pytest.mark.parametrize("move", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_tables_stay_float32_when_the_model_is_cast(move):
    model = Transformer(TINY)
    before = [table.clone() for table in model.tables]
    move(model)
    assert all(map(torch.equal, model.tables, before))
    assert {table.dtype for table in model.tables} == {torch.float32}


def test_tables_follow_the_device():
    model = Transformer(TINY).to("meta")
    assert {table.device.type for table in model.tables} == {"meta"}
    assert {t.device.type for t in model.to_empty(device="cpu").tables} == {"cpu"}


def test_bfloat16_autocast_gives_float32_logits_near_the_exact_ones():
    model, ids = Transformer(TINY), some_ids(TINY, 2, 20)
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids), model.loss(ids, ids)
        cached = model(ids, model.new_cache(2))
    assert logits.dtype == torch.float32 and loss.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(cached, exact, rtol=0.05, atol=0.02)
    loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_a_bfloat16_model_gives_float32_logits():
    model = Transformer(TINY).bfloat16()
    ids = some_ids(TINY, 1, 7)
    assert model(ids).dtype == model.loss(ids, ids).dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_break_gives_the_same(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    config = dataclasses.replace(TINY, n_layer=1)
    model, ids = loud(config, torch.float32), some_ids(config, 2, 16)
    compiled = torch.compile(model.loss, fullgraph=True, backend=backend)
    loss, expected = compiled(ids, ids), model.loss(ids, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_parts_have_the_shapes_they_promise():
    x, tables = torch.randn(2, 5, 32), rotary_tables(5, 8)
    assert SwiGLU(32, 44)(x).shape == x.shape
    assert Attention(32, 4, 1)(x, *tables).shape == x.shape
    assert Block(TINY)(x, *tables).shape == x.shape
    assert Attention(32, 4, 1).k_proj.weight.shape == (8, 32)
