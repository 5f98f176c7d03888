"""The tokenizer against its oracles: the naive algorithm, tiktoken, Hugging Face tokenizers."""

import doctest
import json
import os
import pickle
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings

from nanolm import tokenizer as module
from nanolm.tokenizer import (
    BYTE_CHARACTERS,
    BYTE_OF_ID,
    END_OF_TEXT,
    GPT2_SPLIT,
    GPT4_SPLIT,
    Tokenizer,
    count_words,
    learn_merges,
    merge_word,
    read_merges,
    spell,
)

SHARED = Path(os.environ.get("NANOLM_SHARED") or Path(__file__).parents[2] / "shared")
GPT2 = SHARED / "data" / "gpt2"
ANIMALS = "fox hen owl crow hare mole stoat clock bell spring wheel pendulum".split()
HARD = [
    "",
    " ",
    "\x00\x00a\x00",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\xa0",
    "naïve café, Ærøskøbing: ŝafo kaj horloĝo",
    "狐は時計を見た。時計は狐を見なかった。",
    "Лиса и часы; Ξ ἀλώπηξ",
    "🦊⏰👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202eabc\u202c \ufeff \U0010ffff",
    "\r\n\r\n \t\u2028\u2029\x1c\x1f  x  ",
    "don't DON'T 'tis we'll''ll ʼs '",
    "   the   fox\n\n\n   sleeps   ",
    "1234567 Ⅻ ½ ٣٤ 3.14e-10",
    "<|endoftext|> <|endoftext|",
]


def fables(count: int, seed: int = 0) -> list[str]:
    """Text with many words, and many ties between them."""
    draw = random.Random(seed)
    words = ANIMALS + [a[:2] + b[-3:] for a in ANIMALS for b in ANIMALS] + [", 'twas", "!\n", "42"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train([*fables(200), *HARD, *HARD], 700)


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    first = tokenizer.vocab_size - len(tokenizer.special_tokens)
    return tiktoken.Encoding(
        "ours",
        pat_str=tokenizer.pattern,
        mergeable_ranks={tokenizer.token_bytes(i): i for i in range(first)},
        special_tokens=tokenizer.special_tokens,
    )


def hugging_face(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer)
    return peer


def replaced(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    for token in ids:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def naive_merges(words: dict[str, int], limit: int) -> list[tuple[int, int]]:
    rows = [(module.byte_ids(word), count) for word, count in words.items()]
    merges: list[tuple[int, int]] = []
    while len(merges) < limit:
        counts: Counter[tuple[int, int]] = Counter()
        for ids, count in rows:
            for pair in pairwise(ids):
                counts[pair] += count
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        rows = [(replaced(ids, merges[-1], 255 + len(merges)), count) for ids, count in rows]
    return merges


def naive_encode(ids: list[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    while pairs := [pair for pair in pairwise(ids) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        ids = replaced(ids, best, ranks[best])
    return ids


def test_worked_examples_in_docstrings():
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed


# ---------------------------------------------------------------- bytes


def test_byte_characters_are_those_of_hugging_face():
    assert list(BYTE_CHARACTERS.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_CHARACTERS) == list(range(256))
    assert BYTE_CHARACTERS[ord(" ")] == "Ġ" and BYTE_CHARACTERS[ord("\n")] == "Ċ"
    assert BYTE_OF_ID[0] == ord("!")


# ---------------------------------------------------------------- training


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text("ab c", min_size=1, max_size=12), st.integers(1, 4)))
def test_learnt_merges_equal_the_naive_ones(words):
    assert learn_merges(words, 30) == naive_merges(words, 30)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), max_size=8), st.integers(0, 60))
def test_learnt_merges_equal_the_naive_ones_on_unicode(texts, limit):
    words = count_words([module.well_formed(t) for t in texts], module.compile_split(GPT2_SPLIT))
    assert learn_merges(words, limit) == naive_merges(words, limit)


@pytest.mark.parametrize("texts", [fables(300), HARD, fables(20, seed=5) + HARD, [*"abcabcaab"]])
def test_merges_and_ids_equal_hugging_face(texts):
    tokenizer = Tokenizer.train(texts, 1000, special_tokens=())
    peer = hugging_face(texts, 1000)
    model = json.loads(peer.to_str())["model"]
    spelt = [spell(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    ours = [[spelt[left], spelt[right]] for left, right in tokenizer.merges]
    assert [list(merge) for merge in model["merges"]] == ours
    assert model["vocab"] == {text: i for i, text in enumerate(spelt)}
    for text in [*texts, *HARD]:
        assert tokenizer.encode(text) == peer.encode(text).ids


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("abé \n'", min_size=1, max_size=40), min_size=1, max_size=6))
def test_merges_equal_hugging_face_where_nearly_all_are_ties(texts):
    tokenizer = Tokenizer.train(texts, 300, special_tokens=())
    spelt = [spell(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    model = json.loads(hugging_face(texts, 300).to_str())["model"]
    assert model["vocab"] == {text: i for i, text in enumerate(spelt)}


def test_of_equally_frequent_pairs_the_smallest_ids_win():
    tokenizer = Tokenizer.train(["bc b"], 258)
    assert [tokenizer.token_bytes(256)] == [b"bc"]  # a space stands for id 220, after b
    assert tokenizer.token_bytes(257) == END_OF_TEXT.encode()


def test_training_stops_when_nothing_is_left_to_merge():
    assert Tokenizer.train(["abab"], 10_000).merges == [(64, 65), (256, 256)]
    empty = Tokenizer.train([], 10_000)
    assert empty.vocab_size == 257 and empty.decode(empty.encode("any")) == "any"
    assert Tokenizer.train(["", ""], 300).vocab_size == 257


def test_training_is_deterministic_and_blind_to_the_order_of_texts():
    texts = fables(50)
    fingerprints = {Tokenizer.train(order, 500).fingerprint for order in (texts, texts[::-1])}
    fingerprints.add(Tokenizer.train(iter(texts), 500).fingerprint)
    assert len(fingerprints) == 1


def test_a_smaller_vocabulary_is_a_prefix_of_a_larger_one():
    texts = fables(50)
    assert Tokenizer.train(texts, 400).merges == Tokenizer.train(texts, 600).merges[:143]


@pytest.mark.parametrize("size", [-1, 0, 255, 256])
def test_a_vocabulary_below_the_bytes_and_specials_is_refused(size):
    with pytest.raises(ValueError, match="below 257"):
        Tokenizer.train(["text"], size)
    assert Tokenizer.train(["text"], 256, special_tokens=()).vocab_size == 256


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(ValueError, match="single string"):
        Tokenizer.train("the fox", 300)


def test_special_tokens_in_training_text_are_ordinary_text():
    texts = ["<|endoftext|>" * 20]
    tokenizer = Tokenizer.train(texts, 280)
    assert tokenizer.end_of_text not in tokenizer.encode(texts[0])


def test_progress_bars_show_on_stderr_only_when_asked(capsys):
    quiet = Tokenizer.train(fables(5), 300)
    assert capsys.readouterr() == ("", "")
    shown = Tokenizer.train(fables(5), 300, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "counting words" in err and "learning merges" in err and "43/43" in err
    assert shown.fingerprint == quiet.fingerprint


# ---------------------------------------------------------------- encoding


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_round_trip_and_tiktoken(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert ids == small_peer(small).encode_ordinary(text)


_peers: dict[str, tiktoken.Encoding] = {}


def small_peer(tokenizer: Tokenizer) -> tiktoken.Encoding:
    return _peers.setdefault(tokenizer.fingerprint, tiktoken_of(tokenizer))


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, GPT4_SPLIT])
def test_ids_equal_tiktoken(pattern):
    tokenizer = Tokenizer.train([*fables(200), *HARD], 900, pattern=pattern)
    peer = tiktoken_of(tokenizer)
    for text in [*fables(50, seed=9), *HARD]:
        ids = tokenizer.encode(text)
        assert ids == peer.encode_ordinary(text)
        assert tokenizer.decode(ids) == peer.decode(ids) == text


def test_every_code_point_of_two_planes_encodes_as_in_tiktoken(small):
    peer = tiktoken_of(small)
    points = [chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(points), 1 << 14):
        text = "a".join(points[start : start + (1 << 14)])
        ids = small.encode(text)
        assert ids == peer.encode_ordinary(text) and small.decode(ids) == text


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010), max_size=20))
def test_lone_surrogates_follow_tiktoken(small, text):
    assert small.encode(text) == small_peer(small).encode_ordinary(text)


def test_lone_surrogates_become_replacement_characters(small):
    assert small.decode(small.encode("a\ud83eb")) == "a\ufffdb"
    assert small.decode(small.encode("\ud83e\udd8a")) == "🦊"
    assert Tokenizer.train(["a\udfffb"], 258).decode([256]) != ""


@settings(deadline=None)
@given(st.lists(st.integers(0, 699)))
def test_any_ids_decode_to_their_bytes(small, ids):
    raw = small.decode_bytes(ids)
    assert raw == b"".join(small.token_bytes(i) for i in ids)
    assert small.decode(ids) == raw.decode("utf-8", errors="replace")


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_can_be_decoded(small, raw):
    ids = [BYTE_OF_ID.index(byte) for byte in raw]
    assert small.decode_bytes(ids) == raw
    assert small.decode(ids) == small_peer(small).decode(ids)


@settings(deadline=None)
@given(st.text("abcd ", max_size=60))
def test_the_heap_merges_as_the_naive_loop(small, text):
    tokenizer = Tokenizer.train(["abcd abcab dcba bcbc aaaa adad"], 300)
    ranks = {pair: 256 + k for k, pair in enumerate(tokenizer.merges)}
    for ids in (module.byte_ids(text), [i for i in module.byte_ids(text) if i > 64]):
        assert merge_word(ids, ranks) == naive_encode(ids, ranks)


LONG = {
    "one letter": "a" * 100_000,
    "random letters": "".join(random.Random(0).choices("foxclkens", k=100_000)),
    "words without spaces": "".join(random.Random(1).choices(ANIMALS, k=20_000)),
    "random CJK": "".join(map(chr, random.Random(2).choices(range(0x4E00, 0x9000), k=50_000))),
    "spaces": " " * 100_000,
    "newlines": "\n" * 10_000 + "x",
    "punctuation": "'" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_run_takes_seconds_at_most(small, name):
    text = LONG[name]
    start = time.perf_counter()
    ids = small.encode(text)
    assert time.perf_counter() - start < 5
    assert small.decode(ids) == text
    if name in ("one letter", "random letters", "words without spaces", "random CJK"):
        assert ids == tiktoken_of(small).encode_ordinary(text)


@pytest.mark.parametrize("name", ["one letter", "random letters", "words without spaces"])
def test_training_on_one_long_word_takes_seconds_at_most(name):
    start = time.perf_counter()
    tokenizer = Tokenizer.train([LONG[name]], 2000)
    assert time.perf_counter() - start < 10
    assert tokenizer.decode(tokenizer.encode(LONG[name])) == LONG[name]


def test_the_cache_changes_nothing_and_is_bounded(small, monkeypatch):
    monkeypatch.setattr(module, "CACHED_WORDS", 50)
    fresh = Tokenizer(small.merges)
    texts = [*fables(100), "x" * 1000]
    for text in texts:
        assert fresh.encode(text) == small.encode(text)
        assert len(fresh._cache) <= 50 and all(len(word) <= 32 for word in fresh._cache)


def test_the_caller_cannot_spoil_the_cache(small):
    first = small.encode("fox")
    first.append(0)
    assert small.encode("fox") == first[:-1]


def test_encode_batch(small):
    texts = [*HARD, "a<|endoftext|>b"]
    assert small.encode_batch(texts) == [small.encode(text) for text in texts]
    assert small.encode_batch(iter(texts), allowed_special="all")[-1][1] == small.end_of_text
    assert small.encode_batch([]) == []


@pytest.mark.parametrize("ids", [[700], [-1], [0, 10**30], [3, -700]])
def test_ids_out_of_range_are_named(small, ids):
    with pytest.raises(ValueError, match=f"token id {ids[-1]} is not between 0 and 699"):
        small.decode(ids)
    with pytest.raises(ValueError, match="is not between"):
        small.token_bytes(ids[-1])


def test_ids_may_come_from_numpy_and_torch(small):
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    ids = small.encode("the fox and the clock")
    for dtype in (numpy.uint16, numpy.int64):
        assert small.decode(numpy.array(ids, dtype)) == "the fox and the clock"
    assert small.decode(torch.tensor(ids)) == "the fox and the clock"


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"x*", r"(a)(b)|c", r"(?<=a)b", "a|", r"a\\K", r"\(*", r"\\\(\*x"]
)
def test_no_pattern_loses_text(pattern):
    tokenizer = Tokenizer.train(["ab abc xxab"], 270, pattern=pattern)
    for text in [*HARD, "ab abc xx, yy xab\n", r"a\K ((* \(*x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


BAD = ["(", "[a", "*", r"\p{Nonsense}", r"a\K", "(?r)a", "a\ud800", r"a\\\K"]
VERBS = [r"a(*SKIP)(*FAIL)", "(?x)a (*PRUNE)", "a(*F)", r"\\(*SKIP)"]


@pytest.mark.parametrize("pattern", BAD + VERBS)
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="split pattern") as caught:
        Tokenizer([], pattern=pattern)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- special tokens


def test_special_tokens_are_text_unless_allowed(small):
    text = "a<|endoftext|>b"
    assert small.end_of_text == small.vocab_size - 1 == small.special_tokens[END_OF_TEXT]
    assert small.end_of_text not in small.encode(text)
    assert small.encode(text) == small_peer(small).encode_ordinary(text)
    allowed = small.encode(text, allowed_special={END_OF_TEXT})
    assert allowed == small.encode(text, allowed_special="all")
    assert allowed == small_peer(small).encode(text, allowed_special="all")
    assert allowed == [*small.encode("a"), small.end_of_text, *small.encode("b")]
    assert small.decode(allowed) == small.decode(small.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a ", " b", "<|endoftext|>", "<|end", "|>", "\ud800", "狐"])))
def test_allowed_specials_anywhere_equal_tiktoken(small, pieces):
    text = "".join(pieces)
    expected = small_peer(small).encode(text, allowed_special="all")
    assert small.encode(text, allowed_special="all") == expected


def test_several_specials_each_allowed_on_its_own_and_the_longest_first():
    names = ("<a>", "<a><b>", "$^|.*")
    tokenizer = Tokenizer.train(["x"], 259, special_tokens=names)
    assert tokenizer.special_tokens == {"<a>": 256, "<a><b>": 257, "$^|.*": 258}
    assert tokenizer.encode("<a><a><b>$^|.*", allowed_special="all") == [256, 257, 258]
    only = tokenizer.encode("<a>$^|.*", allowed_special=["$^|.*"])
    assert only == [*tokenizer.encode("<a>"), 258]


def test_special_tokens_that_make_no_sense_are_refused(small):
    for bad in ("ab", [""], ["a", "a"], ["\ud800"]):
        with pytest.raises(ValueError, match="special_tokens"):
            Tokenizer([], special_tokens=bad)
    with pytest.raises(ValueError, match="has no special token '<|pad|>'"):
        small.encode("x", allowed_special={"<|pad|>"})
    with pytest.raises(ValueError, match='must be "all" or a set of names'):
        small.encode("x", allowed_special=END_OF_TEXT)
    with pytest.raises(ValueError, match="has no special token"):
        _ = Tokenizer([], special_tokens=()).end_of_text
    assert Tokenizer([], special_tokens=()).encode("a", allowed_special="all") == [64]


# ---------------------------------------------------------------- merges and files


@pytest.mark.parametrize("merges", [[(256, 0)], [(0, -1)], [(0, 1), (258, 0)], [(0, 1), (0, 1)]])
def test_merges_that_make_no_sense_are_refused(merges):
    with pytest.raises(ValueError, match=f"merge {len(merges) - 1} "):
        Tokenizer(merges)


def test_save_and_load(small, tmp_path):
    path = tmp_path / "new" / "folder" / "tokenizer.json"
    small.save(path)
    small.save(str(path))
    again = Tokenizer.load(path)
    assert again.fingerprint == small.fingerprint and again.merges == small.merges
    assert again.special_tokens == small.special_tokens and again.pattern == small.pattern
    assert [again.encode(text) for text in HARD] == [small.encode(text) for text in HARD]
    assert [item.name for item in path.parent.iterdir()] == ["tokenizer.json"]


def test_the_file_is_readable_json(small, tmp_path):
    small.save(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert list(content) == "format version pattern special_tokens merges sha256".split()
    assert content["format"] == "nanolm-tokenizer" and content["version"] == 1
    assert content["special_tokens"] == [END_OF_TEXT] and content["pattern"] == GPT2_SPLIT
    assert content["sha256"] == small.fingerprint
    assert read_merges(content["merges"]) == small.merges
    assert (tmp_path / "t.json").read_bytes().count(b"\n") > len(small.merges)


def test_the_format_does_not_drift(tmp_path):
    tokenizer = Tokenizer.train(["the fox, the clock, the fox"], 262)
    tokenizer.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == {
        "format": "nanolm-tokenizer",
        "version": 1,
        "pattern": GPT2_SPLIT,
        "special_tokens": ["<|endoftext|>"],
        "merges": ["h e", "t he", "f o", "Ġ the", "Ġ fo"],
        "sha256": "ab1be91e2cc9a91fa052546dc0d070544a685892792834d5aabca950f3a87e6b",
    }


def test_fingerprints_tell_tokenizers_apart(small):
    others = [
        Tokenizer(small.merges[:-1]),
        Tokenizer(small.merges, pattern=GPT4_SPLIT),
        Tokenizer(small.merges, special_tokens=()),
    ]
    assert len({tokenizer.fingerprint for tokenizer in [small, *others]}) == 4
    assert Tokenizer(small.merges).fingerprint == small.fingerprint


def refused(path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300 + len(str(path)) and path.name in message
    return message


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "t.json"
    Tokenizer.train(fables(3), 270).save(path)
    whole = path.read_bytes()
    for size in range(len(whole) - 2):
        path.write_bytes(whole[:size])
        refused(path)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "t.json"
    tokenizer = Tokenizer.train(fables(3), 270)
    tokenizer.save(path)
    whole = path.read_bytes()
    for i in range(len(whole)):
        for flip in (1, 2, 0x20, 0x80):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
            try:
                assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
            except ValueError as error:
                assert "\n" not in str(error)


def resealed(path: Path, **changes: object) -> Path:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    if "sha256" not in changes:
        del content["sha256"]
        content["sha256"] = module.seal(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format": "other"}, "not a tokenizer of nanolm"),
        ({"version": 2}, "version"),
        ({"version": "1"}, "version"),
        ({"version": 10**3000}, "version"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"sha256": None}, "sha256"),
        ({"merges": ["Ġ t"]} | {"sha256": "x" * 10**6}, "sha256"),
        ({"merges": [1, 2]}, "damaged"),
        ({"merges": {"Ġ t": 1}}, "damaged"),
        ({"pattern": None}, "damaged"),
        ({"special_tokens": "abc"}, "damaged"),
        ({"merges": ["t h", "th e", "he y"]}, "merge 2 joins a token that does not exist"),
        ({"merges": ["t h e"]}, "merge 0"),
        ({"merges": ["x" * 10**6]}, "merge 0"),
        ({"merges": [""]}, "merge 0"),
        ({"merges": ["t h", "t h"]}, "merge 1 makes a token that is there already"),
        ({"special_tokens": ["x" * 10**6] * 2}, "special_tokens"),
        ({"special_tokens": ["\ud800"]}, "special_tokens"),
        ({"pattern": "("}, "pattern"),
        ({"pattern": "(" * 10**5}, "pattern"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_even_with_a_right_hash(tmp_path, changes, word):
    path = tmp_path / "t.json"
    Tokenizer.train(fables(3), 270).save(path)
    assert word in refused(resealed(path, **changes))


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "{}", "[" * 10**6, "1" * 10**5, "\xff"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("latin-1"))
    refused(path)


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "t.json"
    with open(path, "wb") as file:
        file.truncate(1 << 33)
    assert "too large" in refused(path)


def test_a_failed_save_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    small.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer([]).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_tokenizer_can_travel_to_another_process(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.fingerprint == small.fingerprint and again.encode("fox") == small.encode("fox")


# ---------------------------------------------------------------- GPT-2


@pytest.mark.skipif(not GPT2.exists(), reason="GPT-2's vocabulary is not there")
def test_gpt2_loads_and_encodes_as_tiktoken(monkeypatch):
    lines = (GPT2 / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = Tokenizer(read_merges(lines))
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    spelt = {spell(tokenizer.token_bytes(i)): i for i in range(tokenizer.vocab_size - 1)}
    assert spelt | tokenizer.special_tokens == vocab and tokenizer.vocab_size == 50257
    peer = tiktoken_of(tokenizer)
    source = Path(module.__file__).read_text(encoding="utf-8")
    texts = [*HARD, *fables(50), source, regex.sub(r"\s", "", source)]
    expected = [peer.encode_ordinary(text) for text in texts]
    for ways in (1, 10**9):  # of encoding: in bulk, and word by word
        monkeypatch.setattr(module, "BULK", ways)
        assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.encode("hello world") == [31373, 995]
