"""Decoding against the loop of the sampling chapter and against the whole forward pass.

Without a GPU the kernels are interpreted, and the checker looks at every address. On a GPU the same
tests run them for real, recorded, with teams whose programs wait for each other.
"""

import contextlib
import copy
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apart import NO_TRITON, compiled_rows, python
from place import DEVICE, on_gpu, with_kernels
from seeded import one_seed  # noqa: F401

from nanolm.batch import Text
from nanolm.decode import (
    Decoder,
    Kernels,
    Plan,
    choose_plan,
    continue_text,
    decode,
    decoder_of,
    fits,
    packed,
    programs_at_once,
    settings_of,
)
from nanolm.interpret import checked, interpreting
from nanolm.model import ModelConfig, Transformer
from nanolm.sample import SampleConfig, filter_logits, generate, generate_ids
from nanolm.tokenizer import Tokenizer

module = sys.modules["nanolm.decode"]  # the package hands out the function of that name
ROOT = Path(__file__).resolve().parent.parent
# NumPy, which interprets, finds infinite scores worth a word
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = dict(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=48, max_seq_len=24)
GREEDY = SampleConfig(max_tokens=3, temperature=0.0)
WAITS = not interpreting()
PLANS = [Plan(1, BT=16, BF=16, WORDS=32), Plan(4, not WAITS, BT=32, BF=16)]


@pytest.fixture(autouse=True)
def few_are_short(monkeypatch):
    """To read by steps takes long where they are interpreted."""
    if interpreting():
        monkeypatch.setattr(module, "SHORT", 4)


def some_model(dtype=torch.float32, device="cpu", **changes):
    """A model whose weights are far from those at birth, where all logits are nearly equal."""
    model = Transformer(ModelConfig(**SMALL | changes))
    for p in model.parameters():
        p.data.normal_(std=0.2) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def some_prompts(*lengths, vocab_size=61):
    return [torch.randint(vocab_size, (n,)).tolist() for n in lengths]


def looped(model, prompts, config, stop_ids=(), vocab_size=None):
    """What the loop of the sampling chapter makes of each prompt, with the seeds of `decode`."""
    found = []
    for j, ids in enumerate(prompts):
        one = config if config.seed is None else replace(config, seed=config.seed + j)
        found.append(list(generate_ids(model, ids, one, stop_ids, vocab_size=vocab_size)))
    return found


def watched():
    return checked() if interpreting() else contextlib.nullcontext()


def by_kernels(model, rows, plan, **options):
    return Decoder(model.to(DEVICE), rows, kernels=True, plan=plan, **options)


# ---- plain -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        SampleConfig(max_tokens=40, temperature=0.0, repetition_penalty=1.3),
        SampleConfig(max_tokens=40, seed=7),
        SampleConfig(max_tokens=40, temperature=1.5, top_k=9, top_p=0.8, seed=7),
        SampleConfig(max_tokens=9, repetition_penalty=1.5, seed=2**62),
        SampleConfig(max_tokens=0),
        SampleConfig(max_tokens=1, seed=1),
    ],
)
def test_on_a_cpu_it_is_the_loop(config):
    model, prompts = some_model(), some_prompts(1, 7, 3, 24, 23, 1)
    right = looped(model, prompts, config)
    assert decode(model, prompts, config) == right
    for rows in (1, 2, 5):
        assert decode(Decoder(model, rows), prompts, config) == right, rows


def test_stop_ids_end_a_text_and_free_its_row():
    model, prompts = some_model(), some_prompts(4, 2, 9, 1)
    config = SampleConfig(max_tokens=50, temperature=1.5, seed=3)
    right = looped(model, prompts, config, stop_ids=(5, 6, 7))
    assert min(map(len, right)) < 50
    decoder = Decoder(model, 2)
    assert decode(decoder, prompts, config, stop_ids=(5, 6, 7)) == right
    assert decoder.lengths == [-1, -1]


@pytest.mark.parametrize(
    "options", [{}, {"stop": ("ab", "\n")}, {"stop_tokens": ("e", "a")}, {"max_tokens": 3}]
)
def test_a_text_by_the_decoder_is_that_of_the_stream(options):
    model, tokenizer = some_model(vocab_size=300), Tokenizer(())
    decoder, ends = Decoder(model, vocab_size=tokenizer.vocab_size), []
    for seed in range(6):
        config = SampleConfig(**{"max_tokens": 90, "temperature": 2.0, "seed": seed} | options)
        text = Text(tokenizer, "a tale", config)
        found = list(continue_text(decoder, text))
        assert "".join(found) == generate(model, tokenizer, "a tale", config)
        assert text.slid == (len(text.ids) > 24) and decoder.lengths == [-1]
        ends.append(text.finish)
    assert "stop" in ends or "max_tokens" in options


def test_a_text_of_a_diverged_model_is_an_error():
    model = some_model(vocab_size=300)
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        list(continue_text(Decoder(model), Text(Tokenizer(()), "a")))


def test_a_decoder_for_a_tokenizer():
    model, small = some_model(vocab_size=300), some_model(vocab_size=200)
    assert decoder_of(model, Tokenizer(())).engine.vocab_size == 257
    assert decoder_of(small, Tokenizer(())).engine.vocab_size == 200
    assert decoder_of(model, Tokenizer(())).engine.norm.dtype == torch.bfloat16


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model, prompts = some_model(), some_prompts(4, 2)
    config = SampleConfig(max_tokens=60, temperature=3.0, seed=3)
    found = decode(model, prompts, config, vocab_size=7)
    assert found == looped(model, prompts, config, vocab_size=7)
    assert max(max(ids) for ids in found) < 7


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1}, {"n_kv_head": 4}, {"n_head": 2}])
def test_plain_logits_are_those_of_the_whole_pass(shape):
    model = some_model(torch.float64, **shape)
    texts = some_prompts(1, 5, 24, 11)
    decoder = Decoder(model, 6)
    rows = [4, 0, 2, 5]
    decoder.put(rows, texts, [GREEDY] * 4)
    lengths = [len(ids) - 1 for ids in texts]
    assert [decoder.lengths[row] for row in rows] == lengths
    found = decoder.engine.logits(rows, lengths)
    for logits, ids in zip(found, texts, strict=True):
        assert torch.allclose(logits, model(torch.tensor([ids]))[0, -1], rtol=1e-6, atol=1e-6)


def test_the_pack_holds_every_weight_once():
    model = some_model()
    weights = [p.double() for block in model.blocks for p in block.parameters()]
    found = [part.double() for part in packed(model)]
    assert sum(part.numel() for part in found) == sum(w.numel() for w in weights)
    squares = [sum(x.square().sum() for x in some) for some in (found, weights)]
    assert squares[0].isclose(squares[1])


def test_half_precision_and_another_type():
    model, prompts = some_model(), some_prompts(3, 9)
    low = copy.deepcopy(model).bfloat16()
    assert decode(Decoder(model, 2, dtype=torch.bfloat16), prompts, GREEDY) == decode(
        Decoder(low, 2), prompts, GREEDY
    )
    assert model.embedding.weight.dtype == torch.float32


# ---- rows --------------------------------------------------------------------------------------


def test_a_full_row_and_an_empty_one_give_nothing():
    decoder = Decoder(some_model(), 3)
    decoder.put([0, 2], some_prompts(23, 3), [GREEDY] * 2)
    found = decoder.steps(4).tolist()
    assert [sum(i >= 0 for i in row) for row in found] == [2, 0, 4]
    assert found[0][2:] == [-1, -1] and found[1] == [-1] * 4
    assert decoder.lengths == [24, -1, 6]


def test_the_global_state_is_not_touched():
    model, before = some_model(), torch.get_rng_state()
    one, two = (decode(model, [[1]], SampleConfig(max_tokens=30, temperature=2.0)) for _ in "ab")
    assert torch.equal(before, torch.get_rng_state()) and one != two


@pytest.mark.parametrize(
    "prompts, word",
    [([[]], "1 to 24"), ([[1] * 25], "1 to 24"), ([[1], [61]], "0 to 60"), ([[-1]], "0 to 60")],
)
def test_bad_prompts(prompts, word):
    decoder = Decoder(some_model(), 2)
    with pytest.raises(ValueError, match=word):
        decode(decoder, prompts, GREEDY)
    with pytest.raises(ValueError):
        decoder.put(range(len(prompts)), prompts, [GREEDY] * len(prompts))
    assert decoder.lengths == [-1, -1], "a refused prompt changes nothing"


def test_an_end_that_cannot_come_is_an_error():
    with pytest.raises(ValueError, match="unknown stop token 61"):
        decode(some_model(), [[1]], GREEDY, stop_ids=[5, 61])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"vocab_size": 62}, {"vocab_size": -1}])
def test_bad_decoders(options):
    with pytest.raises(ValueError, match="no decoder of"):
        Decoder(some_model(), **options)


@pytest.mark.parametrize("config", [GREEDY, SampleConfig(seed=1)])
def test_a_model_that_has_diverged(config):
    model = some_model()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        decode(model, [[1, 2]], config)


def test_without_triton_plain_pytorch_decodes():
    print_it = """
        from nanolm.decode import decode
        from nanolm.interpret import has_triton
        from nanolm.model import ModelConfig, Transformer
        from nanolm.sample import SampleConfig
        model = Transformer(ModelConfig.preset("pocket"))
        print(has_triton(), decode(model, [[1]], SampleConfig(max_tokens=3, seed=1)))
    """
    out = python(textwrap.dedent(NO_TRITON) + textwrap.dedent(print_it))
    assert out.startswith("False [[") and out.count(",") == 2


# ---- the kernels -------------------------------------------------------------------------------


@with_kernels
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"team{plan.G}")
def test_kernels_draw_what_the_model_finds_likeliest(plan):
    model, prompts = some_model(), some_prompts(1, 7, 20)
    right = looped(model, prompts, GREEDY)
    with watched():
        decoder = by_kernels(model, 2, plan)  # the third prompt gets a used row
        assert decode(decoder, prompts, GREEDY) == right


@with_kernels
def test_kernels_slide_and_stop_like_the_loop():
    model, config = some_model(max_seq_len=6, n_layer=1), SampleConfig(max_tokens=9, temperature=0)
    prompts = some_prompts(6, 2)
    right = looped(model, prompts, config)
    assert decode(by_kernels(model, 2, PLANS[0]), prompts, config) == right
    stop = right[0][4]
    right = looped(model, prompts, config, [stop])
    assert decode(by_kernels(model, 2, PLANS[0]), prompts, config, [stop]) == right


@with_kernels
@pytest.mark.parametrize("longest", [1, 2, 4, 5, 33])
def test_prompts_are_read_by_steps_or_by_the_whole_pass(longest):
    """Beside a row that is under way, and whose cache is not to change."""
    model = some_model(n_layer=1, max_seq_len=40)
    texts = some_prompts(5, longest + 1, 1 + longest // 2)
    decoder = by_kernels(model, 4, PLANS[1])
    right = model.new_cache(2)
    padded = [[*ids, *[0] * (longest + 1 - len(ids))] for ids in texts[1:]]
    model.hidden(torch.tensor(padded, device=DEVICE), right)
    with watched():
        decoder.put([2], texts[:1], [GREEDY])
        before = [part[:, 2].clone() for part in (decoder.cache.keys, decoder.cache.values)]
        decoder.put([3, 0], texts[1:], [GREEDY] * 2)
    for part, old, new in zip(
        (decoder.cache.keys, decoder.cache.values), before, (right.keys, right.values), strict=True
    ):
        assert torch.equal(part[:, 2], old) and not part[:, 1].any()
        for row, i in ((3, 0), (0, 1)):
            end = len(texts[1 + i]) - 1
            assert torch.allclose(part[:, row, :, :end], new[:, i, :, :end], atol=1e-5)
    assert torch.isnan(decoder.engine.parts).all(), "the places of the parts are empty again"
    assert decoder.engine.state[:, 1].tolist() == [longest // 2, -1, 4, longest]


def kernel_logits(model, texts, plan):
    """Logits of each text's next id, as the kernels leave them for filters."""
    decoder = by_kernels(model, len(texts), plan)
    many = [SampleConfig(top_k=2, seed=1)] * len(texts)
    with watched():
        decoder.put(range(len(texts)), texts, many)
        decoder.steps(1)
    return decoder.engine.logits


SHAPES = [
    {"n_kv_head": 4},
    {"n_kv_head": 1, "n_layer": 1},
    {"d_ff": 7, "n_layer": 1, "vocab_size": 33},
    {"n_head": 1, "n_kv_head": 1, "d_model": 16},
]


@with_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("team", [1, 2])
def test_kernels_at_every_shape(shape, team):
    model = some_model(**shape)
    V = model.config.vocab_size
    texts = some_prompts(1, 18, vocab_size=V)  # in blocks of 16
    plan = Plan(min(team, model.config.n_head), not WAITS, BT=16, BF=16, WORDS=32)
    found = kernel_logits(model, texts, plan).cpu()
    for logits, ids in zip(found, texts, strict=True):
        right = model.cpu()(torch.tensor([ids]))[0, -1]
        assert torch.allclose(logits, right, rtol=1e-4, atol=1e-4)


@with_kernels
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"team{plan.G}")
def test_in_bfloat16_the_error_is_at_most_twice_that_of_pytorch(plan):
    low = some_model(torch.bfloat16)
    texts = some_prompts(1, 20)
    found = kernel_logits(low, texts, plan).double().cpu()
    low, exact = low.cpu(), copy.deepcopy(low).cpu().double()
    for logits, ids in zip(found, texts, strict=True):
        right = exact(torch.tensor([ids]))[0, -1]
        plain = low(torch.tensor([ids]))[0, -1].double()
        assert (logits - right).norm() <= 2 * (plain - right).norm()


@with_kernels
def test_a_part_that_is_missing_is_noticed():
    """The check of the checks: with one member's weights gone, the ids are others."""
    model, prompts = some_model(), some_prompts(9)
    right = looped(model, prompts, GREEDY)
    decoder = by_kernels(model, 1, PLANS[1])
    decoder.engine.pack[0, 2 * 64 : 3 * 64] = 0  # rows of the output of some heads
    assert decode(decoder, prompts, GREEDY) != right


@with_kernels
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"team{plan.G}")
@pytest.mark.parametrize("config", [GREEDY, SampleConfig(top_k=3, seed=1), SampleConfig(seed=1)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_kernels_say_when_a_model_has_diverged(plan, config, bad):
    model = some_model(n_layer=1)
    model.blocks[0].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(ValueError, match="diverged"):
        decode(by_kernels(model, 1, plan), [[1, 2]], replace(config, max_tokens=1))


# ---- draws -------------------------------------------------------------------------------------


def chi_square(count, p):
    """How far counts are from what probabilities p promise, and 5 deviations above the mean."""
    expected = count.sum() * p
    big = expected >= 5
    assert not count[p == 0].any(), "what is excluded was drawn"
    rest = (count[~big].sum() - expected[~big].sum()) ** 2 / expected[~big].sum().clamp_min(1)
    freedom = int(big.sum())
    found = ((count - expected)[big] ** 2 / expected[big]).sum() + rest
    return float(found), freedom + 5 * (2 * freedom) ** 0.5


def engine_for_draws(logits, config, rows):
    """Kernels with these logits in every row, and other seeds."""
    V = len(logits)
    model = some_model(vocab_size=V, n_layer=1).to(DEVICE)
    engine = Kernels(model, model.new_cache(rows), V, Plan(1, WORDS=32))
    configs = [replace(config, seed=j) for j in range(rows)]
    engine.start(range(rows), [[0]] * rows, range(rows), configs)
    engine.place(range(rows), [0] * rows, [0] * rows)
    engine.logits[:] = logits.to(DEVICE)
    return engine


def chosen(engine, steps):
    """Words that the filtering kernel draws from the engine's logits, (steps, rows)."""
    rows, V = engine.logits.shape
    best = torch.zeros(steps, rows, device=DEVICE)
    word = torch.zeros_like(best, dtype=torch.int32)
    for i in range(steps):
        with watched() if i == 0 else contextlib.nullcontext():
            module.choose_kernel[(rows,)](
                engine.logits, engine.seen, engine.settings, engine.state, best, word, i, rows, V,
                99, BV=module.power_of_two(V), num_warps=4,
            )  # fmt: skip
    return word.cpu().long()


@with_kernels
@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(temperature=0.7, top_k=12),
        SampleConfig(temperature=1.3, top_p=0.8),
        SampleConfig(temperature=1.0, top_k=12, top_p=0.7),
    ],
)
def test_filtered_frequencies(config):
    logits = 1.5 * torch.randn(30)
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    p = filter_logits(logits, **options).softmax(-1)
    found = chosen(engine_for_draws(logits, config, 30), 12)
    statistic, limit = chi_square(torch.bincount(found.flatten(), minlength=30), p)
    assert statistic < limit
    wrong, _ = chi_square(torch.bincount(found.flatten(), minlength=30), (p + 0.05) / 2.5)
    assert wrong > limit, "and another distribution would have been noticed"


@with_kernels
def test_unfiltered_frequencies():
    """The draw of the head itself: 64 rows a launch, words of three tiles."""
    rows, steps, V = 64, 20, 70
    config = SampleConfig(temperature=0.8)
    engine = engine_for_draws(torch.zeros(V), config, rows)
    engine.hidden[:] = torch.randn(64).to(DEVICE)
    logits = (engine.hidden[0].float() @ engine.weight.float().T).cpu()
    best = torch.zeros(steps, rows, 3, device=DEVICE)
    word = torch.zeros_like(best, dtype=torch.int32)
    with watched():
        for i in range(steps):
            module.head_kernel[3, 1](
                engine.hidden, engine.weight, engine.logits, engine.parts, engine.settings,
                engine.state, best, word, i, rows, V, engine.parts.numel(), D=64, BK=64, BM=64,
                WORDS=32, TILES=3, FILTER=False, CHUNK=256,
            )  # fmt: skip
    found = word.cpu().long().gather(2, best.cpu().argmax(2, keepdim=True)).flatten()
    p = (logits / 0.8).softmax(-1)
    statistic, limit = chi_square(torch.bincount(found, minlength=V), p)
    assert statistic < limit
    assert torch.isnan(engine.parts).all(), "and the places of the parts are empty again"


@with_kernels
@pytest.mark.parametrize("top_k", [1, 7, 100])
def test_top_k_keeps_as_many(top_k):
    logits = torch.randn(64)
    logits[10] = logits[20] = logits[30]  # equals stay together, as in `keep_top_k`
    found = chosen(engine_for_draws(logits, SampleConfig(temperature=9.0, top_k=top_k), 15), 6)
    kept = filter_logits(logits, temperature=9.0, top_k=top_k, top_p=1.0).isfinite()
    assert kept[found].all()
    if top_k < 8:
        assert set(found.flatten().tolist()) == set(kept.nonzero().flatten().tolist())


@with_kernels
def test_min_p_and_penalty():
    logits = torch.tensor([3.0, 2.9, 2.0, -1.0] + [-9.0] * 28)
    engine = engine_for_draws(logits, SampleConfig(temperature=1.0, repetition_penalty=4.0), 50)
    engine.settings[:, 4] = 0.2  # a third of the best stays, a fiftieth does not
    engine.seen[:] = 0
    engine.seen[:, 0] = 1
    found = set(chosen(engine, 1).flatten().tolist())  # 3 / 4, 2.9 and 2, of which 2.9 - ln 5 stay
    assert found == {1, 2}
    assert engine.seen[:, 1:3].sum() == 50, "what is drawn has occurred"


def test_settings_are_floats_whatever_was_given():
    config = SampleConfig(temperature=0, repetition_penalty=2)
    assert torch.tensor([settings_of(config)]).dtype == torch.float32


@with_kernels
def test_what_a_full_row_would_have_drawn_has_not_occurred():
    """Else the penalty would depend on how many steps were taken past the end."""
    model, config = some_model(n_layer=1), SampleConfig(repetition_penalty=1.5, seed=1)
    decoder = by_kernels(model, 2, PLANS[0])
    text = some_prompts(23)
    decoder.put([0], text, [config])
    with watched():
        found = decoder.steps(4)[0].tolist()
    assert found[2:] == [-1, -1]
    seen = decoder.engine.seen.cpu().bool()
    assert set(seen[0].nonzero().flatten().tolist()) == {*text[0], *found[:2]}
    assert not seen[1].any()


@with_kernels
@pytest.mark.parametrize("config", [SampleConfig(seed=5), SampleConfig(top_k=20, seed=5)])
def test_a_seed_is_a_seed_whoever_sits_beside(config):
    model, prompts = some_model(n_layer=1), some_prompts(4, 9)
    config = replace(config, max_tokens=2, temperature=1.5)
    with watched():
        together = decode(by_kernels(model, 2, PLANS[0]), prompts, config)
        alone = by_kernels(model, 3, PLANS[0])
        alone.put([1], prompts[1:], [replace(config, seed=6)])
        again = alone.steps(1).tolist()[1] + alone.steps(1).tolist()[1]
    assert again == together[1] and together[0] != together[1]


# ---- plans -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_to_pytorch():
    good = ModelConfig()
    assert fits(good, torch.bfloat16) and fits(ModelConfig.preset("pocket"), torch.float32)
    assert not fits(good, torch.float64)
    assert not fits(ModelConfig(n_head=6, n_kv_head=2, d_model=192), torch.bfloat16)
    assert not fits(ModelConfig(d_model=64), torch.bfloat16), "heads of 8 channels"
    assert not fits(ModelConfig(d_model=1024), torch.bfloat16)


def test_a_team_never_waits_for_programs_that_cannot_run(monkeypatch):
    class Card:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    cuda, found = torch.device("cuda"), []
    for B in (1, 2, 16, 17, 33, 64, 66, 67, 132, 500):
        plan = choose_plan(ModelConfig(), B, cuda)
        found.append(plan.G)
        assert plan.G == 1 or plan.G * B <= programs_at_once(plan, 132)
    assert found[0] == 8 and found[-1] == 1 and found == sorted(found, reverse=True)
    assert choose_plan(ModelConfig(n_head=4), 1, cuda).G == 4
    assert choose_plan(ModelConfig(), 1, torch.device("cpu")).G == 1
    assert programs_at_once(Plan(4, maxnreg=128), 132) == 264
    assert programs_at_once(Plan(4, maxnreg=128, num_warps=16), 132) == 132


@pytest.fixture(scope="module")
def gate():
    """What the kernels take of cards that are not here; compiled in a process of its own."""
    return compiled_rows("decode_gate", ("80",), ("90",))


@with_kernels
def test_kernels_fit_cards_that_are_not_here(gate):
    from nanolm.interpret import SHARED

    for row in gate:
        card = int(row["case"].split("-")[0].removeprefix("sm_"))
        assert row["shared"] <= 1024 * SHARED[card], row
        if row["kernel"] == "head_kernel":
            assert row["tensor_cores"], row
        if row["kernel"] == "layers_kernel" and "B1-" in row["case"]:
            assert row["stack"] == 0, row


# ---- on a GPU ----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("B, plan", [(1, None), (5, None), (64, None), (64, Plan(1)), (3, Plan(4))])
def test_teams_that_wait_find_what_split_launches_find(B, plan):
    model = some_model(torch.bfloat16, DEVICE, vocab_size=2000, max_seq_len=600, d_ff=100)
    prompts = some_prompts(*[1 + 37 * j % 400 for j in range(B)], vocab_size=2000)
    config = SampleConfig(max_tokens=150, temperature=0.7, seed=1)
    waiting = Decoder(model, B, plan=plan)
    split = Decoder(model, B, plan=waiting.engine.plan._replace(SPLIT=True))
    assert decode(waiting, prompts, config) == decode(split, prompts, config)
    assert decode(waiting, prompts, config) == decode(waiting, prompts, config)


@on_gpu
def test_replays_follow_rows_and_settings():
    model, prompts = some_model(device=DEVICE, vocab_size=300), some_prompts(3, 9, 5)
    decoder = Decoder(model, 4)
    for config in (GREEDY, SampleConfig(max_tokens=50, temperature=0.0)):
        right = decode(Decoder(model.cpu(), 4), prompts, config)
        model.to(DEVICE)
        assert decode(decoder, prompts, config) == right
    drawn = SampleConfig(max_tokens=50, temperature=1.3, top_k=40, repetition_penalty=1.2, seed=1)
    assert decode(decoder, prompts, drawn) == decode(decoder, prompts[:2], drawn) + [
        decode(decoder, prompts[2:], replace(drawn, seed=3))[0]
    ]


def test_an_error_leaves_nothing_behind():
    """The rows of a call that failed are not drawn from again, whatever they hold."""
    model = Transformer(ModelConfig(**SMALL | {"vocab_size": 61}))
    model.embedding.weight.data[5] = math.nan
    decoder, config = Decoder(model, 2, vocab_size=5), SampleConfig(max_tokens=3, temperature=0.0)
    with pytest.raises(ValueError, match="diverged"):
        decode(decoder, [[3], [5]], config)
    assert decode(decoder, [[3]], config) == decode(model, [[3]], config, vocab_size=5)


def test_a_penalty_for_ids_that_are_not_drawn():
    model = Transformer(ModelConfig(**SMALL | {"vocab_size": 61}))
    config = SampleConfig(max_tokens=4, temperature=0.0, repetition_penalty=1.3)
    found = decode(Decoder(model, 1, vocab_size=50), [[55, 3]], config)
    assert len(found[0]) == 4 and max(found[0]) < 50
