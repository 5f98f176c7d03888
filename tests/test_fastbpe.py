"""The fast tokenizer against the textbook one, `regex`, Hugging Face tokenizers and tiktoken."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load
import tokenizers
from apart import unmeasured
from hypothesis import given, settings

import nanolm.fastbpe as fast
import nanolm.tokenizer as plain
from nanolm.data import plain_files, read_documents
from nanolm.tokenizer import (
    ASCII_SPLITS,
    END_OF_TEXT,
    GPT2_SPLIT,
    GPT4_SPLIT,
    Tokenizer,
    compile_split,
    count_words,
    learn_merges,
    merge_word,
    spell,
)

ROOT = Path(__file__).resolve().parent.parent
both = pytest.mark.parametrize("pattern", [GPT2_SPLIT, GPT4_SPLIT], ids=["gpt2", "gpt4"])
ALPHABET = [*"  \n\n\t'''stmdlvreSLRVEaZé09²½_-.!?\r\x0b\x0c\u00a0\u3000\u2028\u0085\x1c\x1f\0"]
ALPHABET += [*"日本𝔘😀٣ǅ́‍̓ſKab\ufeff\U0010ffff"]
POOLS = [
    "".join(ALPHABET),
    " 'st\n",
    " \n\t\u3000a!",
    "'lvrestmd aLſ",
    "0123٣ a",
    " \n!a1\r",
    "ab ",
]
tangled = st.sampled_from(POOLS).flatmap(lambda pool: st.text(pool, max_size=120))
SOURCE = Path(fast.__file__).read_text(encoding="utf-8") + Path(plain.__file__).read_text("utf-8")
PROSE = (
    "".join(read_documents("fables:150"))
    + "Łódź, naïve; 狐は時計を見た。Лиса и часы 🦊⏰ don't\n\n" * 9
)
TEXTS = [SOURCE, PROSE, PROSE.upper(), "".join(POOLS) * 3]


def words_of(data: bytes, pattern: str) -> list[bytes]:
    found = []
    for block, starts in fast.cut_blocks(data, pattern):
        ends = [*starts.tolist()[1:], len(block)]
        found += [block[i:j] for i, j in zip(starts.tolist(), ends, strict=True)]
    return found


def textbook(texts: list[str], limit: int, pattern: str) -> list[tuple[int, int]]:
    return learn_merges(count_words(texts, compile_split(pattern)), limit)


def textbook_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    words = plain.split_words(plain.well_formed(text), compile_split(tokenizer.pattern))
    return [i for w in words for i in merge_word(plain.byte_ids(w), tokenizer.ranks)]


def peer_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    count = 256 + len(tokenizer.merges)
    return tiktoken.Encoding(
        "ours",
        pat_str=tokenizer.pattern,
        mergeable_ranks={tokenizer.token_bytes(i): i for i in range(count)},
        special_tokens=tokenizer.special_tokens,
    )


@pytest.fixture(scope="module", params=[GPT2_SPLIT, GPT4_SPLIT], ids=["gpt2", "gpt4"])
def trained(request) -> Tokenizer:
    return Tokenizer.train(TEXTS, 3000, pattern=request.param, workers=1)


# ---------------------------------------------------------------- classes and words


def test_every_code_point_has_the_class_that_regex_gives_it():
    classes = fast.character_classes(newlines=True)
    assert len(classes) == 0x110000
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    text = "".join(map(chr, points))
    expected = np.full(0x110000, fast.OTHER, np.uint8)
    kinds = {r"\p{L}": fast.LETTER, r"\p{N}": fast.DIGIT, r"\s": fast.WHITE}
    for sign, kind in kinds.items():
        found = [ord(character) for character in regex.findall(sign, text)]
        expected[found] = kind
    expected[0x20], expected[[0x0A, 0x0D]] = fast.SPACE, fast.NEWLINE
    assert np.array_equal(classes[points], expected[points])
    assert np.array_equal(fast.character_classes()[[0x0A, 0x0D]], [fast.WHITE] * 2)


@both
@settings(max_examples=600)
@given(
    st.lists(tangled, min_size=1, max_size=3),
    st.sampled_from([(16, 1), (16, 50), (40, 1 << 22), (1 << 17, 1 << 22)]),
)
def test_words_are_those_of_the_pattern(pattern, texts, sizes):
    data = b"".join(text.encode() + fast.SEPARATOR for text in texts)
    expected = []
    for text in texts:
        expected += [word.encode() for word in regex.findall(pattern, text)] + [fast.SEPARATOR]
    kept = fast.STEP, fast.BLOCK
    fast.STEP, fast.BLOCK = sizes
    try:
        assert words_of(data, pattern) == expected
    finally:
        fast.STEP, fast.BLOCK = kept


@both
def test_words_around_every_code_point(pattern):
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(points), 1 << 16):
        text = "".join(f"a{c}!{c} {c}1" for c in points[start : start + (1 << 16)])
        data = text.encode() + fast.SEPARATOR
        expected = [word.encode() for word in regex.findall(pattern, text)]
        assert words_of(data, pattern)[:-1] == expected


@both
def test_words_around_a_few_wide_characters(pattern, monkeypatch):
    """Where nearly all is ASCII, the others are looked up alone; white space among them or not."""
    monkeypatch.setattr(fast, "STEP", 1500)
    points = [chr(i) for i in range(0x80, 0x30000, 7) if not 0xD800 <= i < 0xE000]
    points += [c for c in map(chr, range(0x80, 0x3100)) if c.isspace()]
    random.Random(0).shuffle(points)
    plain = " plain words, 12 of them, don't end here"
    text = "".join(f"a{c}!{c} {c}1'{c}\n{c}{c} '{c}s{plain * 4}" for c in points)
    expected = [word.encode() for word in regex.findall(pattern, text)]
    assert words_of(text.encode() + fast.SEPARATOR, pattern)[:-1] == expected


def test_a_text_without_signs_is_cut_at_its_spaces():
    """Steps must not grow for want of a word that begins with something visible."""
    data = ("a quick brown fox jumps over lazy dogs " * 30_000).encode()
    step = data[: fast.STEP]
    starts = fast.find_starts(step, GPT2_SPLIT)
    assert len(starts) - fast.last_safe(step, starts) < 9


@both
@settings(max_examples=400)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_the_patterns_for_ascii_say_the_same(pattern, text):
    assert plain.re.findall(ASCII_SPLITS[pattern], text, plain.re.ASCII) == regex.findall(
        pattern, text
    )


# ---------------------------------------------------------------- the table


@given(st.lists(st.sets(st.integers(0, 40)), max_size=8), st.sampled_from([1, 2, 4]))
def test_the_table_is_a_dictionary(batches, width):
    table, known = fast.WordTable(width, bits=2), {}
    for batch in batches:
        new = sorted(batch - known.keys())
        values = np.array([7 * word for word in new], np.int64)
        columns = [np.array(new, np.uint64) // np.uint64(3) ** np.uint64(i) for i in range(width)]
        if not new:
            continue
        columns[-1] = np.array(new, np.uint64)  # so that they differ
        if width == 1:
            columns = [np.array(new, np.uint64) << np.uint64(58)]
        table.insert(columns, values)
        known |= dict(zip(new, zip(*columns, strict=True), strict=True))
    asked = [*known, *range(100, 110)]
    cells = [known.get(word, (np.uint64(word),) * width) for word in asked]
    found, absent = table.find([np.array(column, np.uint64) for column in zip(*cells, strict=True)])
    assert sorted(absent.tolist()) == [*range(len(known), len(asked))]
    assert found[: len(known)].tolist() == [7 * word for word in known]
    assert table.words == len(known) <= len(table.values) / 2


@pytest.mark.parametrize("count", [0, 1, 7, 300, 5000])
def test_pairs_merge_into_what_the_merges_say(count):
    rng = random.Random(count)
    merges, known = [], {}
    while len(merges) < count:
        pair = rng.randrange(256 + len(merges)), rng.randrange(256 + len(merges))
        if pair not in known:
            known[pair] = 256 + len(merges)
            merges.append(pair)
    table = fast.PairTable(merges)
    asked = merges + [(rng.randrange(-1, 256 + count), rng.randrange(-1, 256)) for _ in range(9999)]
    asked += [(b, a) for a, b in merges] + [(-1, -1), (0, 0)]
    left, right = np.array(asked, np.int32).T
    assert table.get(left, right).tolist() == [known.get(pair, fast.NONE) for pair in asked]
    byte = (left < 256) & (right < 256)
    expected = [known.get(pair, fast.NONE) for pair in asked if max(pair) < 256]
    assert table.get_bytes(left[byte], right[byte]).tolist() == expected
    assert count < 300 or len(table.tables) > 1  # so that the second table was asked too


# ---------------------------------------------------------------- training


@both
@settings(max_examples=60)
@given(st.lists(tangled, max_size=5), st.integers(0, 60))
def test_merges_equal_the_textbook(pattern, texts, limit):
    options = {"pattern": pattern, "workers": 1, "special_tokens": ()}
    found = Tokenizer.train(texts, 256 + limit, **options).merges
    assert found == textbook(texts, limit, pattern)


@both
@pytest.mark.parametrize("few", [0, 5, 10**9])
def test_merges_by_sweeps_and_by_loops_are_the_same(pattern, few, monkeypatch):
    monkeypatch.setattr(fast, "FEW", few)
    texts = [*TEXTS, "a" * 999, "abab" * 99 + "aba"]
    found = Tokenizer.train(texts, 1500, pattern=pattern, workers=1).merges
    assert found == textbook(texts, 1500 - 257, pattern)


@pytest.mark.parametrize("size", [6, 12, 25, 60, 90])
def test_counts_of_many_new_words_add_up(size, monkeypatch):
    monkeypatch.setattr(fast, "PART", 100_000)
    rng = random.Random(size)
    words = ["".join(rng.choices("abcdefgh", k=size)) for _ in range(20_000)]
    texts = [" ".join(words), " ".join(words[::-1]), "new " * 9 + " ".join(words)]
    counts, long = fast.count_all(texts, GPT2_SPLIT, 1, False).take()
    expected = count_words(texts, compile_split(GPT2_SPLIT))
    assert sum(int(many.sum()) for _, many in counts) + sum(long.values()) == expected.total()
    assert sum(len(many) for _, many in counts) + len(long) == len(expected)


def test_a_floor_leaves_nothing_out():
    counts, long = fast.count_all(TEXTS, GPT2_SPLIT, 1, False).take()
    found = []
    for floor in (1, 100, 10**6):
        row = fast.Row(*fast.lay_row(counts, long), [1] * 256, 2000)
        found.append(fast.learn_row(row, 1700, floor))
    assert found[0] == found[1] == found[2] and len(found[0]) == 1700


def test_more_than_65536_ids():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(30_000)]
    text = " ".join(words)
    tokenizer = Tokenizer.train([text], 90_000, workers=1)
    assert tokenizer.vocab_size > 1 << 16
    assert tokenizer.merges == textbook([text], 90_000 - 257, GPT2_SPLIT)
    ids = fast.encode_array(tokenizer, [text])
    assert ids.dtype == np.uint32 and ids.max() == tokenizer.end_of_text
    assert ids[:-1].tolist() == textbook_ids(tokenizer, text)


@both
def test_merges_equal_hugging_face(pattern):
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
    options = {"initial_alphabet": pre.ByteLevel.alphabet(), "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2500, **options)
    peer.train_from_iterator(TEXTS, trainer)
    tokenizer = Tokenizer.train(TEXTS, 2500, pattern=pattern, special_tokens=(), workers=1)
    spelt = {spell(tokenizer.token_bytes(i)): i for i in range(2500)}
    assert json.loads(peer.to_str())["model"]["vocab"] == spelt
    assert [peer.encode(text).ids for text in TEXTS] == tokenizer.encode_batch(TEXTS)


def test_one_long_word_takes_work_in_proportion(monkeypatch):
    work, merge = [0], fast.Row.merge

    def counted(row, left, right, new, places):
        work[0] += len(places)
        return merge(row, left, right, new, places)

    monkeypatch.setattr(fast.Row, "merge", counted)
    letters = "".join(random.Random(3).choices("foxclkens", k=200_000))
    for text in ("a" * 200_000, letters):
        done = []
        for size in (50_000, 200_000):
            work[0] = 0
            tokenizer = Tokenizer.train([text[:size]], 1500, workers=1)
            tokenizer.known = None
            tokenizer.encode(text[:size])
            done.append(work[0])
        assert done[1] < 6 * done[0] and done[1] < 6 * 200_000


def corpus(folder: Path, name: str = "a.txt") -> Path:
    path = folder / name
    documents = [*read_documents("fables:3000"), SOURCE, PROSE, "狐は\n時計を\n見た。\n\n" * 500]
    path.write_text("".join(f"{text}\n{END_OF_TEXT}\n" for text in documents), encoding="utf-8")
    return path


@both
def test_workers_and_the_order_of_files_change_nothing(pattern, tmp_path, monkeypatch):
    path = corpus(tmp_path)
    texts = list(read_documents(str(path)))
    expected = Tokenizer.train(texts, 1500, pattern=pattern, workers=1)
    assert expected.merges == textbook(texts, 1500 - 257, pattern)
    half = len(texts) // 2
    for name, some in (("b.txt", texts[:half]), ("c.txt", texts[half:])):
        whole = "".join(f"{text}\n{END_OF_TEXT}\n" for text in some)
        (tmp_path / name).write_text(whole, encoding="utf-8")
    monkeypatch.setattr(fast, "PART", 100_000)
    shards = [tmp_path / "b.txt", tmp_path / "c.txt"]
    for given_texts, workers in (([path], 1), ([path], 2), (shards, 3), (shards[::-1], 2)):
        found = Tokenizer.train(given_texts, 1500, pattern=pattern, workers=workers)
        assert found.fingerprint == expected.fingerprint
    mixed = Tokenizer.train([shards[0], *texts[half:]], 1500, pattern=pattern, workers=2)
    assert mixed.fingerprint == expected.fingerprint


FILES = {
    "plain": "one\n\ntwo",
    "ends": f"one\n{END_OF_TEXT}\n\n\ntwo \n{END_OF_TEXT}",
    "in a line": f"one {END_OF_TEXT} two\n{END_OF_TEXT} x\n",
    "indented": f"one\n \t{END_OF_TEXT} \ntwo\n",
    "windows": f"one\r\ntwo\r\n{END_OF_TEXT}\r\nthree\rfour\n",
    "marked": "\ufeffone two\n",
    "other white space": "".join(
        f"x{i}\n{a}{END_OF_TEXT}{b}\n"
        for i, (a, b) in enumerate(
            zip("\u00a0\u0085\u2028\x1c\t\f\v ", " \t\u00a0\u0085\x1c\t\v\f", strict=True)
        )
    ),
    "far in": f"one\n{' ' * 150}{END_OF_TEXT}{chr(9) * 150}\ntwo\n{' ' * 200}x {END_OF_TEXT}\n",
    "white": f"a\u3000\n{END_OF_TEXT}\n\u3000b\n\u2028\nc\n\n\n d\n",
}


@both
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [1, 7, 1 << 23])
def test_a_file_is_read_as_its_documents(pattern, name, part, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(FILES[name].encode() * 3)
    expected = fast.count_all(list(read_documents(str(path))), pattern, 1, False).take()
    monkeypatch.setattr(fast, "PART", part)
    found = fast.count_all([path], pattern, 1, False).take()

    def as_words(result):
        counts, long = result
        rows = [fast.word_bytes(columns).tobytes() for columns, _ in counts]
        sizes = [many.tolist() for _, many in counts]
        raw = [
            row[i * 8 * w : (i + 1) * 8 * w].rstrip(b"\xff")
            for row, w in zip(rows, fast.WIDTHS, strict=True)
            for i in range(len(row) // (8 * w))
        ]
        return dict(zip(raw, [n for some in sizes for n in some], strict=True)) | long

    assert as_words(found) == as_words(expected)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: not UTF-8 text") as caught:
        Tokenizer.train([path], 300)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        Tokenizer.train([tmp_path / "gone.txt"], 300)
    with pytest.raises(ValueError, match="single string"):
        Tokenizer.train(path, 300)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Tokenizer.train(["a"], 300, workers=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a fifo")
@pytest.mark.parametrize("pattern", [GPT2_SPLIT, r"\w+"])
def test_only_a_regular_file_is_trained_on(tmp_path, pattern):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            Tokenizer.train([path], 300, pattern=pattern, workers=1)


def test_other_patterns_read_files_too(tmp_path):
    path = corpus(tmp_path)
    found = Tokenizer.train([path], 300, pattern=r"\w+")
    expected = Tokenizer.train(list(read_documents(str(path))), 300, pattern=r"\w+")
    assert found.merges == expected.merges and found.known is None
    assert fast.encode_array(found, ["a b", ""]).tolist()[-1] == found.end_of_text


def test_files_that_may_be_cut_are_told_apart(tmp_path):
    path = corpus(tmp_path)
    assert plain_files([str(path)]) == [path]
    (tmp_path / "small.txt").write_text("small")
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(b"x" * (2 << 20))
    for other in ("fables", "hf:name", str(tmp_path / "small.txt"), str(packed)):
        assert plain_files([str(path), other]) == []


def test_the_bar_names_the_pair_just_merged(capsys):
    Tokenizer.train(["the the the"], 260, workers=1, progress=True)
    err = capsys.readouterr().err
    assert "counting words" in err and "learning merges" in err and "3/3" in err
    assert "merges/s" in err and "Ġthe" in err


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found += [int(path.parent.name), *descendants(int(path.parent.name))]
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_ctrl_c_leaves_no_half_file_and_no_process(tmp_path):
    path, out = corpus(tmp_path), tmp_path / "out" / "t.json"
    out.parent.mkdir()
    code = (
        "import signal, sys, pathlib, nanolm.fastbpe as f\n"
        "from nanolm.tokenizer import Tokenizer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "f.PART = 200_000\n"
        "texts = (pathlib.Path(sys.argv[1]) for _ in range(10**6))\n"
        "Tokenizer.train(texts, 9000, workers=2).save(sys.argv[2], compiled=True)\n"
    )
    environment = unmeasured(PYTHONPATH=str(ROOT))
    run = [sys.executable, "-c", code, path, out]
    child = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(descendants(child.pid)) >= 2:  # a worker, and what tracks its resources
            break
        time.sleep(0.05)
    time.sleep(0.5)
    below = descendants(child.pid)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) != 0 and len(below) >= 2
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in below):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the workers outlived the program that had started them")
    assert list(out.parent.iterdir()) == []


# ---------------------------------------------------------------- encoding


RUNS = {
    "a megabyte of one letter": "a" * 10**6,
    "a megabyte without a space": "".join(random.Random(1).choices("etaoinshrdlufoxclk", k=10**6)),
    "CJK without a space": "".join(
        map(chr, random.Random(2).choices(range(0x4E00, 0x9000), k=330_000))
    ),
    "ten thousand newlines": "\n" * 10_000 + "x",
}
PANICS = {"spaces": " " * 10**6 + "x", "newlines": "\n" * 10**6, "signs": "!?" * 500_000}


@pytest.mark.parametrize("name", RUNS)
def test_long_runs_equal_tiktoken(trained, name):
    ids = trained.encode(RUNS[name])
    assert ids == peer_of(trained).encode_ordinary(RUNS[name])
    assert trained.decode(ids) == RUNS[name]


@pytest.mark.parametrize("name", PANICS)
def test_long_runs_on_which_tiktoken_panics(trained, name):
    ids = trained.encode(PANICS[name])
    assert trained.decode(ids) == PANICS[name]
    assert ids == textbook_ids(trained, PANICS[name])


def kinds_of_text() -> list[str]:
    rng = random.Random(4)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    return [
        *TEXTS,
        "",
        "\0",
        "\0\0a\0 \0" * 2000,
        "".join(map(chr, range(0x20))) * 200 + "\x7f\x80\x85\xa0" * 900,
        "".join(map(chr, rng.choices(points, k=30_000))),
        "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 🦊⏰" * 1000,
        "狐は時計を見た。時計は狐を見なかった。\n" * 300 + "Лиса и часы; Ξ ἀλώπηξ " * 300,
        "<|endoftext|> <|endoftext|" * 400,
        "a\ud83eb \ud83e\udd8a \udcff\udc80" * 500,
        "-" * 63 + " " + "-" * 64 + " " + "=" * 200 + " x" * 2000,
        "\x00" * 8 + "\x00" * 17 + "z" * 33 + "\uffff\xff" * 1500,
    ]


def test_ids_equal_tiktoken_on_all_kinds_of_text(trained):
    peer, texts = peer_of(trained), kinds_of_text()
    expected = [peer.encode_ordinary(text) for text in texts]
    fresh = Tokenizer(trained.merges, pattern=trained.pattern)  # knows no words yet
    for tokenizer in (trained, fresh, fresh):
        assert tokenizer.encode_batch(texts) == expected
        assert [tokenizer.encode(text) for text in texts] == expected
    assert [fresh.encode(text) for text in texts] == expected
    special = "a<|endoftext|>" * 500
    assert fresh.encode(special) == peer.encode_ordinary(special)
    allowed = fresh.encode(special, allowed_special="all")
    assert (
        allowed
        == peer.encode(special, allowed_special="all")
        == fresh.encode_batch([special], allowed_special={END_OF_TEXT})[0]
    )


@settings(max_examples=300)
@given(st.lists(tangled, max_size=6))
def test_both_ways_of_encoding_agree(trained, texts):
    expected = [textbook_ids(trained, text) for text in texts]
    assert trained.encode_batch(texts) == expected
    assert [trained.encode(text) for text in texts] == expected
    array = fast.encode_array(trained, texts)
    assert array.tolist() == [i for ids in expected for i in [*ids, trained.end_of_text]]


def test_a_tokenizer_without_an_end_of_text():
    tokenizer = Tokenizer.train(TEXTS, 900, special_tokens=["<pad>"], workers=1)
    assert tokenizer.encode_batch(TEXTS) == [textbook_ids(tokenizer, text) for text in TEXTS]
    with pytest.raises(ValueError, match="has no special token"):
        fast.encode_array(tokenizer, TEXTS)


def test_workers_encode_the_same(trained, monkeypatch):
    monkeypatch.setattr(fast, "TASK", 20_000)
    texts = [*TEXTS, *kinds_of_text()] * 2
    assert trained.encode_batch(texts, workers=2) == trained.encode_batch(texts)
    assert np.array_equal(
        fast.encode_array(trained, texts, workers=2), fast.encode_array(trained, texts)
    )


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, r"\w+"])
def test_bad_batches_are_one_clear_error(pattern):
    tokenizer = Tokenizer([], pattern=pattern)
    for workers in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="workers must be at least 1"):
            tokenizer.encode_batch(["a"], workers=workers)
    assert tokenizer.encode_batch(["!"], workers=None) == [[0]]
    for texts in ("a string", b"bytes", Path("a.txt")):
        with pytest.raises(ValueError, match="single string"):
            tokenizer.encode_batch(texts)
        with pytest.raises(ValueError, match="single string"):
            fast.encode_array(tokenizer, texts)
    for item in (b"bytes", Path(__file__), None):
        with pytest.raises(ValueError, match="must be a string, not"):
            tokenizer.encode_batch(["a", item])
        with pytest.raises(ValueError, match="must be a string, not"):
            tokenizer.encode_batch([item], allowed_special="all")
        with pytest.raises(ValueError, match="must be a string, not"):
            fast.encode_array(tokenizer, [item])
    with pytest.raises(ValueError, match="must be a string, not bytes"):
        Tokenizer.train([b"bytes"], 300, pattern=pattern, workers=1)


def test_an_interrupt_leaves_no_wrong_ids(trained, monkeypatch):
    fresh = Tokenizer(trained.merges, pattern=trained.pattern)
    expected, same = textbook_ids(fresh, PROSE), fast.WordTable.same
    for when in (1, 2, 5, 9):  # after the keys were written, before the values
        calls = [0]

        def interrupted(table, slot, columns, calls=calls, when=when):
            calls[0] += any("insert" in f.name for f in traceback.extract_stack(limit=2))
            if calls[0] == when:
                table.values[:] = 1
                raise KeyboardInterrupt
            return same(table, slot, columns)

        monkeypatch.setattr(fast.WordTable, "same", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.encode(PROSE[::-1] + "foxclocks" * when)
        monkeypatch.setattr(fast.WordTable, "same", same)
        assert fresh.encode(PROSE) == expected


def test_a_worker_that_dies_is_one_clear_error():
    done = fast.in_order(dying, iter(range(99)), 2, 4, os.getpid())
    with pytest.raises(RuntimeError, match="a worker process died.*workers=1"):
        list(done)


def dying(task: int, parent: int) -> int:
    if os.getpid() != parent:
        os._exit(9)
    time.sleep(0.1)
    return task


IN_A_DAEMON = """
import multiprocessing, sys
from nanolm.tokenizer import Tokenizer
import nanolm.fastbpe as f

def work(queue):
    f.TASK = 1000
    queue.put(len(Tokenizer([]).encode_batch(["the fox "] * 2000, workers=2)))

if __name__ == "__main__":
    queue = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=work, args=(queue,), daemon=True)
    child.start()
    print(queue.get(timeout=50))
"""
THREADS = """
import pickle, sys, threading, time
from nanolm.tokenizer import Tokenizer
import nanolm.fastbpe as f

class Mine:
    pass

f.TASK, main, failed = 1000, sys.modules["__main__"], []
print("the main program runs")

def encode():
    tokenizer = Tokenizer([])
    assert len(tokenizer.encode_batch(["the fox "] * 3000, workers=2)) == 3000

threads = [threading.Thread(target=encode) for _ in range(3)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    pickle.dumps(Mine())
    assert sys.modules["__main__"] is main
assert __file__ and __spec__ is None
print("done")
"""


@pytest.mark.parametrize(
    "code, expected", [(IN_A_DAEMON, "2000"), (THREADS, "the main program runs\ndone")]
)
def test_workers_of_a_script(code, expected, tmp_path):
    (tmp_path / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")


def test_what_is_forgotten_is_learnt_again(trained, monkeypatch):
    monkeypatch.setattr(fast, "POOL", 500)
    monkeypatch.setattr(fast, "BLOCK", 5000)
    monkeypatch.setattr(fast, "STEP", 5000)
    fresh = Tokenizer(trained.merges, pattern=trained.pattern)
    for text in TEXTS * 2:
        assert fresh.encode(text) == textbook_ids(fresh, text)
    longest = max(len(textbook_ids(fresh, text)) for text in TEXTS)
    assert fresh._bulk.used < 500 + longest


def test_threads_may_share_a_tokenizer(trained):
    fresh = Tokenizer(trained.merges, pattern=trained.pattern)
    expected, found = [textbook_ids(fresh, text) for text in TEXTS], {}

    def work(number):
        found[number] = [fresh.encode(text) for text in TEXTS]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected for number in range(4))


def test_a_tokenizer_in_use_can_travel(trained):
    trained.encode(PROSE)
    again = pickle.loads(pickle.dumps(trained))
    assert again.encode(PROSE) == trained.encode(PROSE) and again._bulk is not None


# ---------------------------------------------------------------- known words


def read_known(path: Path, tokenizer: Tokenizer) -> fast.Known | None:
    return fast.read_known(path, tokenizer.fingerprint, 256 + len(tokenizer.merges))


def saved(trained: Tokenizer, folder: Path) -> Path:
    trained.save(folder / "t.json", compiled=True)
    assert sorted(path.name for path in folder.iterdir()) == ["t.json", "t.json.words"]
    return folder / "t.json"


def test_known_words_are_read_again(trained, tmp_path):
    again = Tokenizer.load(saved(trained, tmp_path))
    assert again.encode(PROSE) == textbook_ids(trained, PROSE)
    assert isinstance(again.known, dict) and set(again.known) == set(trained.known)
    assert all(np.array_equal(again.known[key], trained.known[key]) for key in trained.known)
    assert again._bulk.tables[0].words >= trained.known["words1"].shape[1]


def damages(whole: bytes) -> dict[str, bytes]:
    line, _, body = whole.partition(b"\n")
    head = json.loads(line)

    def changed(**more):
        return json.dumps(head | more).encode() + b"\n" + body

    wrong_ids = bytearray(whole)
    wrong_ids[-9] ^= 1
    return {
        "empty": b"",
        "cut short": whole[:-1],
        "longer": whole + b"x",
        "one bit": bytes(wrong_ids),
        "no JSON": b"x" + whole,
        "a list": b"[]\n" + body,
        "of another tokenizer": changed(tokenizer="0" * 64),
        "of another version": changed(version=2),
        "another shape": changed(arrays={"ids": ["<u2", [10**9]]}),
        "a pickle": pickle.dumps(trap),
    }


def trap() -> None:
    raise AssertionError("unpickled")


def test_what_does_not_fit_is_made_again(trained, tmp_path):
    path = saved(trained, tmp_path)
    words = plain.words_of(path)
    for name, damaged in damages(words.read_bytes()).items():
        words.write_bytes(damaged)
        again = Tokenizer.load(path)
        assert again.encode(PROSE) == textbook_ids(trained, PROSE), name
        ours = damaged.startswith(fast.KNOWN_BEGIN)  # what is not ours is left alone
        assert (read_known(words, trained) is not None) == ours, name
        assert (words.read_bytes() == damaged) == (not ours)


def test_a_sealed_file_that_makes_no_sense_is_not_used(trained, tmp_path):
    path = plain.words_of(saved(trained, tmp_path))
    good = dict(trained.known)
    assert fast.is_known(good, trained.vocab_size)
    wrong = {
        "an id too large": good | {"ids": good["ids"] + np.uint16(trained.vocab_size - 300)},
        "an id below 0": good | {"ids": -good["ids"].astype(np.int32)},
        "floats": good | {"ids": good["ids"].astype(np.float32)},
        "too few ids": good | {"ids": good["ids"][:-1]},
        "too few sizes": good | {"sizes": good["sizes"][1:]},
        "a column less": good | {"words2": good["words2"][:1]},
        "no columns": good | {"words1": good["words1"][0]},
        "a name less": {name: good[name] for name in good if name != "words4"},
        "a name more": good | {"more": good["ids"]},
    }
    for name, known in wrong.items():
        fast.write_known(path, trained.fingerprint, known)
        assert read_known(path, trained) is None, name
    for arrays in ({"ids": ["<u2", [10**30]]}, {"ids": ["<u2", [-1]]}, {"ids": ["O", [1]]}, [], 1):
        full = {name: ["<u8", [0]] for name in good} if isinstance(arrays, dict) else {}
        head = fast.KNOWN_FORMAT | {"tokenizer": trained.fingerprint}
        head["arrays"] = full | arrays if full else arrays
        head |= {"sha256": fast.seal_known(head, b"")}
        path.write_bytes(json.dumps(head).encode() + b"\n")
        assert read_known(path, trained) is None, arrays
    path.write_bytes(b"[" * 10**6 + b"\n")
    assert read_known(path, trained) is None


def test_known_words_are_not_read_if_too_large(trained, tmp_path, monkeypatch):
    path = plain.words_of(saved(trained, tmp_path))
    monkeypatch.setattr(fast, "LARGEST_TOKENIZER", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("was read"))
    assert read_known(path, trained) is None


def test_the_cache_overwrites_no_file_of_others(trained, tmp_path):
    names = ("english.words", "tok.v1", "tok.v2")
    for name in names:
        Tokenizer(trained.merges[: len(name)]).save(tmp_path / name, compiled=True)
    for name in names:
        assert len(Tokenizer.load(tmp_path / name).merges) == len(name)
        assert (tmp_path / f"{name}.words").is_file()
    with pytest.raises(ValueError, match="english.words: in the way") as caught:
        trained.save(tmp_path / "english", compiled=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "english").exists()
    trained.save(tmp_path / "english")
    before = (tmp_path / "english.words").read_bytes()
    assert Tokenizer.load(tmp_path / "english").encode(PROSE) == textbook_ids(trained, PROSE)
    assert (tmp_path / "english.words").read_bytes() == before


def test_a_tie_of_frequent_words_is_settled_by_the_words(monkeypatch):
    words = ["".join(random.Random(i).choices("abcdefgh", k=3 + i % 20)) for i in range(500)]
    monkeypatch.setattr(fast, "KNOWN", 100)
    found = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(words, len(words))
        known = Tokenizer.train([" ".join(["the", "the", *shuffled])], 300, workers=1).known
        found.append({bytes(w) for name in ("words1", "words2", "words4") for w in known[name].T})
        assert len(known["sizes"]) == len(found[-1]) == 100
    assert found[0] == found[1] == found[2]


def test_words_of_an_old_vocabulary_are_stale(trained, tmp_path):
    path = saved(trained, tmp_path)
    smaller = Tokenizer(trained.merges[:500], pattern=trained.pattern)
    smaller.save(path)
    again = Tokenizer.load(path)
    assert again.encode(PROSE) == textbook_ids(smaller, PROSE)
    assert read_known(plain.words_of(path), smaller) is not None


def test_a_folder_that_cannot_be_written_is_no_obstacle(trained, tmp_path, monkeypatch):
    path = saved(trained, tmp_path)
    plain.words_of(path).write_bytes(fast.KNOWN_BEGIN + b"stale")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fast, "write_whole", full)
    assert Tokenizer.load(path).encode(PROSE) == textbook_ids(trained, PROSE)


# ---------------------------------------------------------------- for other programs


def million(seed: int = 0) -> str:
    rng, text = random.Random(seed), "".join(TEXTS)
    while len(text) < 10**6:
        start = rng.randrange(len(text) - 2000)
        text += text[start : start + rng.randrange(2000)] + rng.choice(ALPHABET)
    return text.replace(END_OF_TEXT, "")  # which Hugging Face's takes for special, always


def test_exports_encode_a_million_characters_alike(trained, tmp_path):
    text = million()
    ids = trained.encode(text)
    trained.save_hf(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == text and theirs.get_vocab_size() == trained.vocab_size
    assert theirs.encode("a<|endoftext|>").ids[-1] == trained.end_of_text
    trained.save_tiktoken(tmp_path / "ranks.tiktoken")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    peer = tiktoken.Encoding(
        "x", pat_str=trained.pattern, mergeable_ranks=ranks, special_tokens=trained.special_tokens
    )
    assert peer.encode_ordinary(text) == ids


def test_transformers_reads_the_export(trained, tmp_path):
    from transformers import PreTrainedTokenizerFast

    trained.save_hf(tmp_path / "tokenizer.json")
    fast_one = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert fast_one(PROSE)["input_ids"] == trained.encode(PROSE)


def test_an_export_of_a_pattern_that_forgets_characters(tmp_path):
    tokenizer = Tokenizer.train(["the fox, the clock"], 300, pattern=r"\w+")
    tokenizer.save_hf(tmp_path / "t.json")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert peer.encode("the fox,  the\nclock!").ids == tokenizer.encode("the fox,  the\nclock!")


def test_the_command_line_trains_and_exports(tmp_path, capsys, monkeypatch):
    from nanolm.__main__ import main

    monkeypatch.chdir(tmp_path)
    path = corpus(tmp_path)
    line = f"tokenizer train {path} --vocab-size 700 --split gpt4 --workers 1 --out t.json"
    assert main(line.split()) == 0
    tokenizer = Tokenizer.load("t.json")
    expected = textbook(list(read_documents(str(path))), 700 - 257, GPT4_SPLIT)
    assert tokenizer.merges == expected and tokenizer.pattern == GPT4_SPLIT
    for kind in ("hf", "tiktoken"):
        assert main(f"tokenizer export t.json --to {kind} --out {kind}.out".split()) == 0
    assert tokenizers.Tokenizer.from_file("hf.out").encode(PROSE).ids == tokenizer.encode(PROSE)
    assert Path("tiktoken.out").read_bytes().count(b"\n") == 699
    assert "hf.out: written" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("t.*")) == ["t.json", "t.json.words"]
