"""Every filter against an independent one, the draws against their distribution, the streams."""

import math

import pytest
import torch
import transformers.generation.logits_process as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.model import ModelConfig, Transformer
from nanolm.sample import (
    SampleConfig,
    boxed,
    columns,
    decode_stream,
    filter_logits,
    generate,
    generate_ids,
    next_logits,
    repetition_penalty,
    sample_logits,
    stream,
    until_stop,
    wrapped,
)
from nanolm.tokenizer import END_OF_TEXT, Tokenizer

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model(vocab_size=257, max_seq_len=32):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=vocab_size,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            d_model=32,
            d_ff=32,
            max_seq_len=max_seq_len,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():  # opinions as strong as a trained model's
            if weight.ndim == 2:
                weight.mul_(30 if weight is model.embedding.weight else 20)
    return model


class Script:
    """A model that wants to say a fixed sequence of ids, whatever it is fed."""

    def __init__(self, ids, vocab_size=257, max_seq_len=64):
        self.ids, self.vocab_size = list(ids), vocab_size
        self.config = ModelConfig(vocab_size=vocab_size, max_seq_len=max_seq_len)
        self.training, self.said = False, 0

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    def train(self, mode=True):
        self.training = mode

    def new_cache(self, batch_size):
        return type("Cache", (), {"length": 0})()

    def hidden(self, ids, cache):
        cache.length += ids.shape[1]
        return torch.zeros(1, ids.shape[1], 1)

    def logits(self, hidden):
        logits = torch.full((self.vocab_size,), -5.0)
        logits[self.ids[self.said % len(self.ids)]] = 5.0
        self.said += 1
        return logits


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(())  # the bare bytes and the end of text


def script(tokenizer, text, end=True, **options):
    tail = [tokenizer.end_of_text] if end else []
    return Script(tokenizer.encode(text) + tail, tokenizer.vocab_size, **options)


GREEDY = SampleConfig(temperature=0, max_tokens=60)


# ---- filters


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 2.5])
def test_temperature_equals_transformers(temperature):
    logits = random_logits(5, 300)
    ours = filter_logits(logits, **{**OFF, "temperature": temperature})
    assert torch.equal(ours, hf.TemperatureLogitsWarper(temperature)(None, logits))


@pytest.mark.parametrize("top_k", [1, 2, 50, 300, 1000])
def test_top_k_equals_transformers(top_k):
    logits = random_logits(5, 300)
    logits[0, :40] = 2.0  # equals: all of them stay, as there
    ours = filter_logits(logits, **{**OFF, "top_k": top_k})
    assert torch.equal(ours, hf.TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_top_p_equals_transformers(top_p, seed):
    logits = random_logits(5, 300, seed=seed)
    ours = filter_logits(logits, **{**OFF, "top_p": top_p})
    assert torch.equal(ours, hf.TopPLogitsWarper(top_p)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 5.0])
def test_penalty_equals_transformers(penalty):
    logits = random_logits(5, 300)
    ids = torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 20:] = ids[:, :20]  # each id at least twice
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(repetition_penalty(logits, ids, penalty), theirs)
    assert torch.equal(repetition_penalty(logits[2], ids[2].tolist(), penalty), theirs[2])


@pytest.mark.parametrize("min_p", [1e-4, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_min_p_equals_transformers(min_p, seed):
    logits = random_logits(5, 300, seed=seed)
    ours = filter_logits(logits, **{**OFF, "min_p": min_p})
    assert torch.equal(ours, hf.MinPLogitsWarper(min_p)(None, logits))


ORDER = [
    hf.RepetitionPenaltyLogitsProcessor(1.7),
    hf.TemperatureLogitsWarper(1.6),
    hf.TopKLogitsWarper(20),
    hf.TopPLogitsWarper(0.8),
    hf.MinPLogitsWarper(0.05),
]


def test_all_filters_in_their_order_equal_transformers():
    logits = random_logits(40, 500)
    ids = torch.arange(600).reshape(40, 15) % 500

    def theirs(order):
        found = logits
        for i in order:
            found = ORDER[i](ids, found)
        return found

    ours = repetition_penalty(logits, ids, 1.7)
    ours = filter_logits(ours, temperature=1.6, top_k=20, top_p=0.8, min_p=0.05)
    assert torch.equal(ours, theirs([0, 1, 2, 3, 4]))
    for other in ([1, 0, 2, 3, 4], [0, 2, 3, 1, 4], [0, 1, 3, 2, 4], [0, 1, 2, 4, 3]):
        differs = not torch.equal(ours.isfinite(), theirs(other).isfinite())
        assert differs == (other != [1, 0, 2, 3, 4]), other
    assert torch.allclose(ours, theirs([1, 0, 2, 3, 4]))  # these two do commute: both multiply


def test_penalty_on_shared_history_and_empty_history():
    logits = random_logits(2, 3, 10)
    both = repetition_penalty(logits, [4, 4], 2.0)
    assert both.shape == logits.shape and (both[..., 4] < logits[..., 4]).all()
    assert torch.equal(both[..., :4], logits[..., :4])
    assert repetition_penalty(logits, [], 2.0) is logits
    assert repetition_penalty(logits, torch.tensor([], dtype=torch.int64), 2.0) is logits


def test_the_token_that_crosses_top_p_is_included():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, kept in ((0.1, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)):
        assert filter_logits(logits, **{**OFF, "top_p": p}).isfinite().sum() == kept


def test_of_equals_at_the_edge_of_the_nucleus_the_first_stay():
    kept = filter_logits(torch.zeros(3, 100), **{**OFF, "top_p": 0.255}).isfinite()
    assert kept[:, :26].all() and not kept[:, 26:].any()


def test_temperature_zero_keeps_the_first_of_the_greatest():
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0], [0.0, -1.0, -torch.inf, -2.0]])
    kept = filter_logits(logits, **{**OFF, "temperature": 0.0})
    assert kept.softmax(-1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert sample_logits(logits, temperature=1e-30).tolist() == [1, 0]


def test_half_precision_logits_are_widened_and_the_input_is_untouched():
    logits = random_logits(3, 50).bfloat16()
    before = logits.clone()
    assert filter_logits(logits, temperature=0.5, top_k=5, top_p=0.9).dtype == torch.float32
    assert torch.equal(logits, before)


# ---- draws


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}]
)
def test_frequencies_match_the_filtered_distribution(options):
    logits, draws = random_logits(12, seed=4, scale=1.5), 40000
    generator = torch.Generator().manual_seed(5)
    drawn = sample_logits(logits.expand(draws, -1), generator=generator, **options)
    count = torch.bincount(drawn, minlength=12).double()
    expected = draws * filter_logits(logits, **{**OFF, **options}).softmax(-1).double()
    assert (count[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((count - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4  # beyond the 99.99th percentile


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_batch_shapes(shape):
    ids = sample_logits(random_logits(*shape, 20), top_k=3)
    assert ids.shape == shape and ids.dtype == torch.int64


def test_extreme_draws_never_hit_an_excluded_token(monkeypatch):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    for uniform, expected in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=uniform, **_: torch.full(shape, u))
        assert sample_logits(logits) == expected


def test_seeds():
    logits = random_logits(64, 100)
    one, again, other = (
        sample_logits(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(7)
    first = sample_logits(logits)
    torch.manual_seed(7)
    assert torch.equal(first, sample_logits(logits))


# ---- generation


def test_greedy_with_the_cache_equals_greedy_without():
    model, ids = small_model(), [5, 200, 31]
    cached = list(generate_ids(model, ids, SampleConfig(temperature=0, max_tokens=25)))
    plain = list(ids)
    for _ in range(25):
        plain.append(int(model(torch.tensor([plain]))[0, -1].argmax()))
    assert cached == plain[3:] and len(set(cached)) > 3


@pytest.mark.parametrize("limit", [1, 2, 7, 16])
def test_past_the_context_the_window_slides_to_its_last_half(limit):
    model = small_model(max_seq_len=limit)
    ids, window, expected = [3], [3], []
    for _ in range(40):
        if len(window) > limit:
            window = window[-max(limit // 2, 1) :]
        expected.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window = window + [expected[-1]]
    assert list(generate_ids(model, ids, SampleConfig(temperature=0, max_tokens=40))) == expected


def test_same_seed_same_ids_and_the_global_state_is_not_touched():
    model = small_model()
    state = torch.get_rng_state()
    one, again, other, free, freer = (
        list(generate_ids(model, [1], SampleConfig(seed=seed, max_tokens=40)))
        for seed in (3, 3, 4, None, None)
    )
    assert one == again != other and free != freer
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_gradients_survive_even_in_the_middle(training):
    model = small_model().train(training)
    tokens = generate_ids(model, [1], SampleConfig(max_tokens=5, seed=0))
    next(tokens)
    assert model.training is training and not torch.is_inference_mode_enabled()
    model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    list(tokens)
    assert model.training is training and model.embedding.weight.grad is not None


def test_ids_beyond_the_tokenizer_are_never_drawn(tokenizer):
    model = small_model(vocab_size=4000)
    assert max(generate_ids(model, [1], SampleConfig(max_tokens=32, seed=0))) > 256
    ids = generate_ids(model, [1], SampleConfig(max_tokens=32, seed=0), vocab_size=257)
    assert max(ids) <= 256
    assert isinstance(generate(model, tokenizer, "a", SampleConfig(max_tokens=32)), str)


def test_stop_ids_end_unseen():
    assert list(generate_ids(Script([5, 6, 7]), [1], GREEDY, stop_ids=(7, 9))) == [5, 6]
    for unknown in (-1, 257):
        with pytest.raises(ValueError, match=f"unknown stop token {unknown}"):
            generate_ids(Script([5]), [1], GREEDY, stop_ids=(unknown,))


def test_stop_tokens_end_unseen_and_are_tokens_not_strings(tokenizer):
    config = SampleConfig(temperature=0, max_tokens=60, stop_tokens=("!", END_OF_TEXT))
    assert generate(script(tokenizer, "oh! no"), tokenizer, "x", config) == "oh"
    merged = Tokenizer([(0, 0)])  # "!!" is one token of its own, which "!" does not stop
    assert generate(script(merged, "oh!!"), merged, "x", config) == "oh!!"
    with pytest.raises(ValueError, match="unknown stop token 'END'.*3 tokens"):
        stream(script(tokenizer, "a"), tokenizer, "x", SampleConfig(stop_tokens=("END",)))


def test_sliding_is_told_once_and_can_be_refused():
    model, said = small_model(max_seq_len=16), []
    config = SampleConfig(temperature=0, max_tokens=60)
    list(generate_ids(model, [3], config, log=said.append))
    assert len(said) == 1 and "its last 8 to 16 tokens" in said[0]
    said.clear()
    fits = SampleConfig(temperature=0, max_tokens=13, context="refuse")
    assert len(list(generate_ids(model, [3, 4, 5], fits, log=said.append))) == 13 and not said
    with pytest.raises(ValueError, match="context of 16: ask for at most 12"):
        generate_ids(model, [3, 4, 5, 6], fits)


@pytest.mark.parametrize("length", range(1, 17))
def test_the_cache_equals_the_full_forward_for_any_prompt_length(length):
    model = small_model(max_seq_len=17).double()
    ids = torch.randint(257, (length + 1,), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        cache = model.new_cache(1)
        before = next_logits(model, ids[:-1].tolist(), cache)
        after = next_logits(model, ids[-1:].tolist(), cache)
        full = model(ids[None])[0]
    assert torch.allclose(before, full[-2]) and torch.allclose(after, full[-1])


def test_penalty_looks_at_prompt_and_output():
    model = Script([5], vocab_size=8)  # wants nothing but 5
    config = SampleConfig(temperature=0, max_tokens=3, repetition_penalty=1e9)
    assert list(generate_ids(model, [1], config)) == [5, 5, 5]  # 5.0 / 1e9 is still above -5
    model.logits = lambda hidden: torch.tensor([-3.0, -1.0, -2.0])
    assert list(generate_ids(model, [1], config)) == [2, 0, 1]


def test_zero_tokens_and_a_prompt_of_exactly_the_context(tokenizer):
    model = small_model(max_seq_len=8)
    assert generate(model, tokenizer, "x", SampleConfig(max_tokens=0)) == ""
    assert len(list(generate_ids(model, list(range(8)), SampleConfig(max_tokens=3)))) == 3


# ---- streams


def test_end_of_text_ends(tokenizer):
    assert generate(script(tokenizer, "a fox."), tokenizer, "once ", GREEDY) == "a fox."


def test_an_empty_prompt_begins_a_document(tokenizer):
    seen = []
    model = script(tokenizer, "hm")
    hidden = model.hidden
    model.hidden = lambda ids, cache: (seen.append(ids.tolist()), hidden(ids, cache))[1]
    assert generate(model, tokenizer, config=GREEDY) == "hm"
    assert seen[0] == [[tokenizer.end_of_text]]


def test_characters_are_never_split(tokenizer):
    text = "naïve 🦊 says “日本”"
    model = script(tokenizer, text)
    pieces = list(stream(model, tokenizer, "x", GREEDY))
    assert "".join(pieces) == text and all(len(p) == 1 and p != "\ufffd" for p in pieces)


def test_a_character_cut_off_by_the_limit_becomes_a_replacement(tokenizer):
    config = SampleConfig(temperature=0, max_tokens=3)
    assert generate(script(tokenizer, "a🦊"), tokenizer, "x", config) == "a\ufffd"


@given(st.lists(st.binary(max_size=4)))
@settings(deadline=None)
def test_streamed_decoding_equals_decoding_at_once(pieces):
    assert "".join(decode_stream(pieces)) == b"".join(pieces).decode("utf-8", "replace")


def test_stop_strings_straddle_tokens(tokenizer):
    config = SampleConfig(temperature=0, max_tokens=60, stop=("\n\n", "END"))
    assert generate(script(tokenizer, "one\ntwo\n\nthree"), tokenizer, "x", config) == "one\ntwo"
    pieces = list(stream(script(tokenizer, "an EN and an END."), tokenizer, "x", config))
    assert "".join(pieces) == "an EN and an " and "EN " in pieces
    assert generate(script(tokenizer, "at the E"), tokenizer, "x", config) == "at the E"


def first_stop(text, stop):
    """The definition: cut where the first stop string to be completed begins."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
@settings(deadline=None, max_examples=400)
def test_stops_do_not_depend_on_how_the_text_is_cut(pieces, stop):
    out = list(until_stop(pieces, stop))
    assert "".join(out) == first_stop("".join(pieces), stop) and "" not in out


# ---- errors and the box


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -2.0},
        {"repetition_penalty": math.nan},
        {"max_tokens": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ("",)},
        {"stop": "END"},
        {"stop": (3,)},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"stop_tokens": ("",)},
        {"stop_tokens": "END"},
        {"context": "roll"},
    ],
)
def test_bad_settings_are_one_line(option):
    with pytest.raises(ValueError) as error:
        SampleConfig(**option)
    assert next(iter(option)) in str(error.value) and "\n" not in str(error.value)
    if next(iter(option)) in OFF:
        with pytest.raises(ValueError):
            sample_logits(torch.zeros(3), **option)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits(bad):
    logits = random_logits(2, 9)
    logits[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample_logits(logits)
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample_logits(torch.full((3,), -torch.inf), temperature=0)


def test_ids_out_of_range_to_penalise():
    for ids in ([9], [-1]):
        with pytest.raises(ValueError, match="penalise"):
            repetition_penalty(torch.zeros(9), ids, 2.0)


def test_prompts_that_cannot_be_continued(tokenizer):
    bare = Tokenizer((), special_tokens=())
    model = small_model(max_seq_len=8)
    with pytest.raises(ValueError, match="empty"):
        stream(model, bare, "")  # at once, not at the first token
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        stream(model, tokenizer, "far too long for eight")
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        generate_ids(model, [], SampleConfig())
    assert (
        generate(
            Script(bare.encode("hi"), 256), bare, "x", SampleConfig(max_tokens=2, temperature=0)
        )
        == "hi"
    )
    assert END_OF_TEXT not in bare.special_tokens


def test_config_documents_itself():
    from dataclasses import fields

    assert all(f.metadata["help"] for f in fields(SampleConfig))


def test_boxed():
    text = "The fox\tran.\n\n" + "word " * 20 + "\x1b[2J"
    for width, title in ((72, ""), (20, "a title much too long"), (40, "step 500")):
        lines = boxed(text, width, title).split("\n")
        assert {len(line) for line in lines} == {width}
        assert lines[0][0] + lines[-1][-1] == "┌┘" and "\x1b" not in "".join(lines)
    assert boxed("hi", 10, "t").split("\n") == ["┌─ t ────┐", "│ hi     │", "└────────┘"]
    assert boxed("", 8) == "┌──────┐\n│      │\n└──────┘"
    with pytest.raises(ValueError, match="width"):
        boxed("hi", 5)


@given(st.text("a é🦊日\u0301\x1b\n\t"), st.integers(8, 30), st.text("a 🦊\n"))
@settings(deadline=None)
def test_a_box_is_as_wide_as_it_says_in_columns(text, width, title):
    assert {columns(line) for line in boxed(text, width, title).split("\n")} == {width}


@given(st.text("ab ", max_size=60), st.integers(2, 12))
@settings(deadline=None)
def test_wrapping_keeps_every_word_in_order(line, width):
    rows = wrapped(line, width)
    assert all(columns(row) <= width for row in rows)
    assert "".join(rows).replace(" ", "") == line.replace(" ", "")
    assert wrapped("the fox saw it", 7) == ["the fox", "saw it"]
    assert wrapped("日本の狐", 5) == ["日本", "の狐"]
