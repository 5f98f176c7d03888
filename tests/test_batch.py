"""Rows of a batch against the same text alone, whatever the company, the settings and the order."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import one_seed  # noqa: F401
from test_sample import small_model

from nanolm.batch import (
    Batch,
    Text,
    Token,
    continue_texts,
    filter_rows,
    generate_batch,
    penalise_rows,
    read_prompts,
    read_rows,
)
from nanolm.model import ModelConfig, Transformer
from nanolm.sample import (
    SampleConfig,
    decode_stream,
    filter_logits,
    generate,
    repetition_penalty,
    until_stop,
)
from nanolm.tokenizer import Tokenizer

FILTERS = ("temperature", "top_k", "top_p", "min_p")
BYTES = Tokenizer(())


@pytest.fixture(scope="module")
def model():
    return small_model(max_seq_len=24).double()


options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 7, 1000]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.5, 0.7]),
        "max_tokens": st.sampled_from([0, 1, 5, 40]),
        "seed": st.integers(0, 9),
        "stop": st.sampled_from([(), ("e",), ("ab", "\n")]),
    }
)


@given(st.lists(st.tuples(st.text("ab é", max_size=8), options), max_size=7), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_a_text_is_the_same_alone_and_in_company(asked, size):
    model = small_model(max_seq_len=24).double()
    prompts, configs = [p for p, _ in asked], [SampleConfig(**o) for _, o in asked]
    found = generate_batch(model, BYTES, prompts, configs, batch_size=size)
    for prompt, config, got in zip(prompts, configs, found, strict=True):
        assert got.text == generate(model, BYTES, prompt, config)
        assert got.finish == ("length" if len(got.tokens) == config.max_tokens else "stop") or (
            config.stop and got.finish == "stop"
        )


def test_texts_that_join_and_leave_at_any_time_do_not_touch_each_other(model):
    dice = random.Random(0)
    config = SampleConfig(max_tokens=30, temperature=1.0)
    alone = {}
    for seed in range(12):
        one = SampleConfig(**{**vars(config), "seed": seed})
        alone[seed] = generate(model, BYTES, "ab" * seed, one)
    batch, said, left = Batch(model, BYTES, 4), {}, 0
    waiting = [
        Text(BYTES, "ab" * seed, SampleConfig(**{**vars(config), "seed": seed}))
        for seed in range(12)
    ]
    numbers = {text: seed for seed, text in enumerate(waiting)}
    while waiting or batch.texts:
        while waiting and batch.room and dice.random() < 0.4:
            text = waiting.pop(dice.randrange(len(waiting)))
            said[text] = ""
            batch.join([text])
        for text, piece, _ in batch.step():
            said[text] += piece
        if batch.texts and dice.random() < 0.05:
            batch.leave(dice.choice(batch.texts))
            left += 1
    assert len(said) == 12 and left
    for text, words in said.items():
        whole = alone[numbers[text]]
        assert words == whole if text.finish else whole.startswith(words)
    assert sum(bool(text.finish) for text in said) == 12 - left


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_rows_equal_the_full_forward_for_any_lengths(lengths, seed):
    model = small_model(max_seq_len=24).double()
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(257, (n,), generator=generator).tolist() for n in lengths]
    with torch.inference_mode():
        cache = read_prompts(model, texts)
        for step in range(3):
            at = torch.tensor(lengths) + step
            new = torch.randint(257, (len(texts),), generator=generator)
            logits = read_rows(model, new, at, cache)
            for row, token in enumerate(new.tolist()):
                texts[row].append(token)
                assert torch.allclose(logits[row], model(torch.tensor([texts[row]]))[0, -1])


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_any_grouping_of_heads(n_kv_head):
    shape = dict(vocab_size=300, n_layer=2, n_head=4, d_model=32, d_ff=32, max_seq_len=16)
    torch.manual_seed(1)
    model = Transformer(ModelConfig(n_kv_head=n_kv_head, **shape)).double()
    with torch.inference_mode():
        cache = read_prompts(model, [[1, 2, 3], [4]])
        logits = read_rows(model, torch.tensor([5, 6]), torch.tensor([3, 1]), cache)
        for row, ids in enumerate(([1, 2, 3, 5], [4, 6])):
            assert torch.allclose(logits[row], model(torch.tensor([ids]))[0, -1])


# ---- filters and draws


@given(st.lists(options, min_size=1, max_size=9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_filters_a_row_equal_filters_alone(each, seed):
    configs = [SampleConfig(**option) for option in each]
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(configs), 60, generator=generator)
    logits[:, :6] = logits[:, 6:12]  # equals
    logits[:, 20:25] = -torch.inf
    mixed = filter_rows(logits, configs)
    said = torch.randint(60, (len(configs), 9), generator=generator)
    seen = torch.zeros(len(configs), 60, dtype=torch.bool).scatter(1, said, True)
    penalised = penalise_rows(logits, seen, configs)
    for row, config in enumerate(configs):
        alone = filter_logits(logits[row], **{name: getattr(config, name) for name in FILTERS})
        assert torch.allclose(mixed[row].softmax(-1), alone.softmax(-1))
        alone = repetition_penalty(logits[row], said[row], config.repetition_penalty)
        assert torch.allclose(penalised[row], alone)


def test_a_nucleus_of_one_row_takes_nothing_from_another():
    logits = torch.full((2, 50), -30.0)
    logits[:, 7] = 0.0  # the sum of the probabilities is 1 at once, to the last digit
    configs = [SampleConfig(temperature=1.0), SampleConfig(temperature=1.0, top_p=0.5)]
    assert filter_rows(logits, configs).isfinite().sum(-1).tolist() == [50, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions(dtype):
    model = small_model(max_seq_len=24).to(dtype)
    found = generate_batch(model, BYTES, ["ab", "", "x" * 20], SampleConfig(max_tokens=30, seed=1))
    assert all(got.finish and math.isfinite(got.logprob) for got in found)


def test_frequencies_match_the_filtered_distribution_of_each_row(model):
    settings = [{"temperature": 3.0, "top_k": 8}, {"temperature": 2.0, "top_p": 0.7}]
    configs = [SampleConfig(max_tokens=1, seed=i, **settings[i % 2]) for i in range(3000)]
    found = generate_batch(model, BYTES, ["fox"] * len(configs), configs, batch_size=300)
    logits = model(torch.tensor([BYTES.encode("fox")]))[0, -1]
    for half, setting in enumerate(settings):
        filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | setting
        p = filter_logits(logits, **filters).softmax(-1).double()
        drawn = [got.tokens[0].id if got.tokens else BYTES.end_of_text for got in found[half::2]]
        seen, expected = torch.bincount(torch.tensor(drawn), minlength=257), len(drawn) * p
        kept = expected > 0
        assert (seen[~kept] == 0).all() and kept.sum() > 3
        chi2 = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
        freedom = int(kept.sum()) - 1
        assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_log_probabilities_are_those_of_the_loss(model):
    config = SampleConfig(max_tokens=15, temperature=1.3, top_k=20, repetition_penalty=1.2, seed=4)
    got = generate_batch(model, BYTES, ["abc"], config, alternatives=5)[0]
    ids = torch.tensor([[*BYTES.encode("abc"), *(token.id for token in got.tokens)]])
    logprobs = model(ids)[0, 2:-1].log_softmax(-1)
    for token, row in zip(got.tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-5)
        best = row.topk(5)
        assert [t.id for t in token.top] == best.indices.tolist()
        assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert 0 < token.chance <= 1 and sum(t.chance for t in token.top) <= 1 + 1e-6


def test_alternatives_are_as_many_as_asked_for_and_never_more_than_there_are(model):
    texts = [Text(BYTES, "a", SampleConfig(max_tokens=1, temperature=0), n) for n in (0, 3, 9999)]
    tokens = {text.alternatives: new for text, _, new in continue_texts(model, BYTES, texts)}
    assert [len(tokens[n][0].top) for n in (0, 3, 9999)] == [0, 3, 257]


# ---- texts


@given(
    st.lists(st.integers(0, 255), max_size=12),
    st.lists(st.text("ab¡", min_size=1, max_size=3), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_a_text_shows_what_the_plain_stream_shows(ids, stop):
    text = Text(BYTES, "x", SampleConfig(stop=tuple(stop), max_tokens=max(len(ids), 1)))
    shown, released = "", []
    for i in ids:
        piece, tokens = text.take(Token(i, -1.0, 0.5))
        shown += piece
        released += tokens
        assert all(token.start <= len(shown) for token in tokens)
        if text.finish:
            break
    whole = "".join(until_stop(decode_stream(map(BYTES.token_bytes, ids)), stop))
    if ids:
        assert text.finish and shown == whole
        assert [token.id for token in released] == ids[: len(released)]
        stopped = text.finish == "stop"
        assert len(released) == len(ids) or stopped
        assert not stopped or all(token.start < max(len(shown), 1) for token in released)


def test_nothing_of_a_stop_string_that_straddles_tokens_is_shown_or_released():
    text = Text(BYTES, "x", SampleConfig(stop=("END",), max_tokens=99))
    shown, released = "", []
    for i in BYTES.encode("an EN and an END of"):
        piece, tokens = text.take(Token(i, -1.0, 0.5))
        shown, released = shown + piece, released + tokens
        assert not shown.endswith(("E", "EN")) and len(released) == len(shown)
        if text.finish:
            break
    assert shown == "an EN and an " and text.finish == "stop"


# ---- errors


def test_who_cannot_join_disturbs_nobody(model):
    batch = Batch(model, BYTES, 2)
    batch.join([Text(BYTES, "a", SampleConfig(max_tokens=3, temperature=0))])
    with pytest.raises(ValueError, match="1 to 24 tokens"):
        batch.join([Text(BYTES, "x" * 25)])
    with pytest.raises(ValueError, match="2 texts want to join, and there is room for 1"):
        batch.join([Text(BYTES, "a"), Text(BYTES, "b")])
    with pytest.raises(ValueError, match="do not fit the context"):
        batch.join([Text(BYTES, "a", SampleConfig(context="refuse"))])
    for unknown in (-1, 257):
        with pytest.raises(ValueError, match=f"unknown id in the prompt {unknown}"):
            batch.join([Text(BYTES, [3, unknown])])
    assert batch.room == 1 and len(batch.texts) == 1
    while batch.texts:
        steps = batch.step()
    assert steps[0][0].finish == "length" and batch.step() == []


def test_bad_batches_are_one_line(model):
    with pytest.raises(ValueError, match="room for one text or more"):
        Batch(model, BYTES, 0)
    with pytest.raises(ValueError, match="2 prompts need as many configs"):
        generate_batch(model, BYTES, ["a", "b"], [SampleConfig()])
    with pytest.raises(ValueError, match="empty"):
        generate_batch(model, Tokenizer((), special_tokens=()), ["a", ""])
    assert generate_batch(model, BYTES, []) == []


def test_after_a_divergence_a_cleared_batch_is_as_new():
    model = small_model(max_seq_len=24).double()
    prompts, config = ("ab", "x" * 14), SampleConfig(seed=1, max_tokens=9)
    expected = [generate(model, BYTES, prompt, config) for prompt in prompts]
    batch, weight = Batch(model, BYTES, 2), model.blocks[0].attn.v_proj.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    batch.join([Text(BYTES, "abcdefghijklmnop")])
    with pytest.raises(ValueError, match="diverged"):
        batch.step()
    with torch.no_grad():
        weight.copy_(good)
    batch.clear()
    texts = [Text(BYTES, prompt, config) for prompt in prompts]
    batch.join(texts)  # the short one sees, behind a mask, what was left behind
    shown = dict.fromkeys(texts, "")
    while batch.texts:
        for text, piece, _ in batch.step():
            shown[text] += piece
    assert list(shown.values()) == expected


def test_a_vocabulary_beyond_the_tokenizer_is_read_but_never_drawn():
    model = small_model(vocab_size=400, max_seq_len=24)
    config = SampleConfig(max_tokens=40, seed=1, repetition_penalty=1.2)
    text = Text(BYTES, [5, 399, 300], config)
    tokens = [token.id for _, _, new in continue_texts(model, BYTES, [text]) for token in new]
    assert max(tokens) < 257


def test_a_model_in_training_is_put_back_and_its_random_state_left_alone(model):
    state = torch.get_rng_state()
    model.train()
    generate_batch(model, BYTES, ["a", "bc"], SampleConfig(max_tokens=3))
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
