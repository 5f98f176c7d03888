"""Fables and their entropy, loaders, shards, batches: every promise of the data chapter."""

import gzip
import json
import lzma
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from apart import unmeasured
from hypothesis import given, settings
from hypothesis import strategies as st

import nanolm.data as d
from nanolm.data import (
    Batches,
    TokenData,
    fable_entropy,
    fable_log_prob,
    fables,
    prepare,
    read_documents,
)
from nanolm.tokenizer import END_OF_TEXT, GPT2_SPLIT, GPT4_SPLIT, Tokenizer

BYTES = Tokenizer([])  # every byte is a token: 257 ids


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# ---------------------------------------------------------------- the language


def test_fables_stream_and_never_change():
    assert list(fables(3, 5)) == list(islice(fables(100, 5), 3))
    assert list(fables(3, 5)) != list(fables(3, 6))
    assert list(fables(0)) == []
    assert next(fables(1)).startswith("Long ago a kind old badger lived under a sleepy mill.")


def test_fables_are_tidy_english():
    for text in fables(3000, 11):
        assert 80 <= len(text.split()) <= 130
        assert not re.search(r"[{}<>|*]|  |\.\.|,,| [.,?]|\n", text)
        assert not re.search(r"\b[Aa] [aeiou]", text)  # an old fox, not a old fox
        assert all(c.isupper() for c in re.findall(r"(?:^|\. )(\w)", text))
        assert text.count('"') % 2 == 0 and text.endswith(".")


def test_fables_keep_their_promises():
    """The same hero, visitor and thing throughout, and an end that fits the quality."""
    for text in fables(1000, 12):
        trait = re.search(r"(greedy|proud|lazy|hasty|kind|patient|clever|brave)", text)[1]
        hero, thing = re.search(
            r"\. The (\w+) (?:had|owned|kept) a \w+ \w+ (\w+) and", text
        ).groups()
        assert re.search(rf"{trait} \w+ {hero}\b", text)
        assert f"your {thing} " in text
        others = {o.parts[0][1] for o in d.grammar()["hero"].tables[""]} - {hero}
        assert not others & set(re.findall(r"\w+", text))
        sad = " alone." in text or " came by, with" in text
        assert sad == (trait in ("greedy", "proud", "lazy", "hasty"))


def test_every_word_is_common_enough_to_learn():
    seen = Counter()
    for text in fables(4000, 13):
        seen.update(set(re.findall(r"\w+", text)))
    assert len(seen) > 500 and min(seen.values()) >= 0.005 * 4000


@given(st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_parser_agrees_with_writer(seed):
    text, log_prob = d.write(d.WHOLE, {}, random.Random(f"{seed}:0"))
    assert text == next(fables(1, seed))
    assert fable_log_prob(text) == pytest.approx(log_prob, abs=1e-9)


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_an_altered_word_is_no_fable_or_another_one(seed, data):
    text = next(fables(1, seed))
    words = text.split(" ")
    i = data.draw(st.integers(0, len(words) - 1))
    with pytest.raises(ValueError, match="no fable"):
        fable_log_prob(" ".join(words[:i] + [words[i] + "x"] + words[i + 1 :]))
    with pytest.raises(ValueError, match="no fable"):
        fable_log_prob(" ".join(words[:i] + words[i + 1 :]))


@pytest.mark.parametrize("text", ["", " ", "Once", "The quick brown fox.", "\ud800", "a" * 10**5])
def test_what_is_no_fable(text):
    with pytest.raises(ValueError, match="no fable") as error:
        fable_log_prob(text)
    one_line(error)


def test_two_readings_would_be_noticed(monkeypatch):
    rules = d.read_grammar("fable: {x}{y}\nx: a | ab\ny: bc | c")
    monkeypatch.setattr(d, "grammar", lambda: rules)
    with pytest.raises(ValueError, match="ambiguous: this text has 2 readings") as error:
        fable_log_prob("abc")
    one_line(error)
    with pytest.raises(ValueError, match="no fable"):
        fable_log_prob("abb")
    assert fable_log_prob("abbc") == pytest.approx(-2 * math.log(2))


def test_every_table_is_prefix_free_by_brute_force():
    """All texts of each option (slots inside opened in every way), sampled where too many."""
    rng = random.Random(0)

    def expand(parts, known):
        if not parts:
            return [""]
        (kind, value), rest = parts[0], parts[1:]
        tails = expand(rest, known)
        if kind == "":
            heads = [value]
        else:
            tables = d.grammar()[value].tables.values()
            heads = [t for table in tables for o in table for t in expand(o.parts, known)]
        if len(heads) * len(tails) > 2000:
            heads, tails = (
                rng.sample(heads, min(40, len(heads))),
                rng.sample(tails, min(40, len(tails))),
            )
        return [head + tail for head in heads for tail in tails]

    for name, rule in d.grammar().items():
        for value, table in rule.tables.items():
            texts = [(i, t) for i, o in enumerate(table) for t in expand(o.parts, {})]
            texts = sorted({(t, i) for i, t in texts})
            for (s, i), (t, j) in zip(texts, texts[1:], strict=False):
                assert i == j or not t.startswith(s), (name, value, s, t)


def test_the_grammar_has_no_loose_ends():
    rules = d.grammar()
    used = {"fable"}
    for rule in rules.values():
        assert not rule.key or set(rule.tables) <= {
            o.parts[0][1] for t in rules[rule.key].tables.values() for o in t
        }
        for table in rule.tables.values():
            assert sum(o.weight for o in table) == table[0].total
            used |= {value for o in table for kind, value in o.parts if kind}
    assert used == set(rules)
    # what a rule depends on is always a plain word, which is what `weigh` takes it for
    for key in {rule.key for rule in rules.values()} - {""}:
        for table in rules[key].tables.values():
            assert all(len(o.parts) == 1 and o.parts[0][0] == "" for o in table)


TOY = """
fable: The {hero} ate {meal}{more}.
hero: fox*3 | hen
meal/hero=fox: a hen*2 | a {fruit}
meal/hero=hen: worms
fruit: pear | plum
more: , and then the <hero> slept
"""


def test_entropy_equals_the_sum_over_all_texts_of_a_toy(monkeypatch):
    rules = d.read_grammar(TOY)
    monkeypatch.setattr(d, "grammar", lambda: rules)
    d.asks.cache_clear(), d.weigh.cache_clear()
    texts = {d.write(d.WHOLE, {}, random.Random(i))[0] for i in range(500)}
    probs = [math.exp(fable_log_prob(text)) for text in texts]
    assert len(texts) == 4 and sum(probs) == pytest.approx(1)
    assert fable_entropy() == pytest.approx(-sum(p * math.log(p) for p in probs))
    d.asks.cache_clear(), d.weigh.cache_clear()


def test_entropy_is_what_writing_says():
    surprises = [-d.write(d.WHOLE, {}, random.Random(f"s{i}"))[1] for i in range(6000)]
    error = np.std(surprises) / len(surprises) ** 0.5
    assert abs(np.mean(surprises) - fable_entropy()) < 4 * error
    assert fable_entropy() == pytest.approx(86.58, abs=0.005)


# ---------------------------------------------------------------- loaders

TEXTS = ["First, with an é.", "Second\n\nin two paragraphs", "third 🦊"]
PLAIN = "".join(f"{text}\n{END_OF_TEXT}\n" for text in TEXTS)
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)


def packed(path: Path, text: str) -> Path:
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".xz":
        data = lzma.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".TXT"])
def test_files(tmp_path, kind, packing):
    path = packed(tmp_path / f"a{kind}{packing}", LINES if kind == ".jsonl" else PLAIN)
    assert list(read_documents(str(path))) == TEXTS
    assert list(read_documents([path, str(path)])) == TEXTS * 2


def test_whole_file_bom_and_windows_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one\ntwo"]
    (tmp_path / "b.txt").write_bytes(b"one\r\n<|endoftext|>\r\ntwo")  # the last one is not closed
    assert list(read_documents(str(tmp_path / "b.txt"))) == ["one", "two"]
    (tmp_path / "c.txt").write_text("a <|endoftext|> b\n")  # not a line of its own: text
    assert list(read_documents(str(tmp_path / "c.txt"))) == ["a <|endoftext|> b"]


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(3000), "text": [f"t{i}" for i in range(3000)]}), path)
    assert list(read_documents(str(path))) == [f"t{i}" for i in range(3000)]
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(ValueError, match='no column "text"') as error:
        list(read_documents(str(path)))
    assert str(path) in one_line(error)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2"):
        list(read_documents(str(path)))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="a.parquet: ") as error:
        list(read_documents(str(path)))
    one_line(error)


def test_directories_and_globs(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "deep" / "er" / "c.txt").write_text("c")
    (tmp_path / "deep" / "photo.jpeg").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(read_documents(str(tmp_path))) == ["a", "b", "c"]
    assert list(read_documents(str(tmp_path / "*.txt"))) == ["b"]
    assert list(read_documents(str(tmp_path / "**" / "*.txt"))) == ["b", "c"]
    assert list(read_documents([tmp_path / "b.txt", "fables:1"]))[0] == "b"


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert list(read_documents(str(tmp_path / "a[1].txt"))) == ["brackets"]
    folder = tmp_path / "d[1]" / "*"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("deeper")
    assert list(read_documents(str(tmp_path / "d[1]"))) == ["deeper"]
    assert list(read_documents(str(folder))) == ["deeper"]


def test_hub_through_datasets_offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets.disable_progress_bars()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(LINES)
    assert list(read_documents(f"hf:{tmp_path / 'folder'}")) == TEXTS
    assert list(read_documents(f"hf:{tmp_path / 'folder'}:train")) == TEXTS
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "one"))
    assert list(read_documents(f"hf:{tmp_path / 'one'}")) == TEXTS
    both = datasets.DatasetDict({"train": rows, "test": rows.select([2])})
    both.save_to_disk(str(tmp_path / "both"))
    assert list(read_documents(f"hf:{tmp_path / 'both'}:test")) == TEXTS[2:]
    for source in (f"hf:{tmp_path / 'both'}:nosuch", f"hf:{tmp_path / 'none'}", "hf:"):
        with pytest.raises(ValueError, match="^hf:") as error:
            list(read_documents(source))
        one_line(error)
    datasets.Dataset.from_dict({"words": TEXTS}).save_to_disk(str(tmp_path / "field"))
    with pytest.raises(ValueError, match='row 1: no field "text"'):
        list(read_documents(f"hf:{tmp_path / 'field'}"))


@pytest.mark.parametrize(
    "source, said",
    [
        ("fables:x", "write fables"),
        ("fables:0", "write fables"),
        ("fables:5:", "write fables"),
        ("fables:1:2:3", "write fables"),
        ("", "no text to read"),
        ("no/such/file.txt", "there is no such file or directory"),
        ("no/such/*.txt", "there is no such file or directory"),
    ],
)
def test_bad_names_are_errors_at_once(source, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read_documents(source)
    assert source in one_line(error)


def test_bad_files(tmp_path):
    def error_of(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            list(read_documents(str(tmp_path / name)))
        return one_line(error)

    good = gzip.compress(PLAIN.encode())
    assert "unknown kind of file" in error_of("a.jpeg", b"x")
    assert "unknown kind of file" in error_of("a.parquet.gz", b"x")
    assert "no text in it" in error_of("empty.txt", b"")
    assert "no text in it" in error_of("blank.txt", b"\n\n<|endoftext|>\n\n")
    assert "no text in it" in error_of("empty.jsonl", b"\n")
    assert "not UTF-8" in error_of("latin.txt", "é".encode("latin-1"))
    assert "line 2: not JSON" in error_of("a.jsonl", b'{"text": "a"}\n{"text": "b')
    assert 'line 1: no field "text"' in error_of("b.jsonl", b'{"txt": "a"}\n')
    assert 'line 1: no field "text"' in error_of("c.jsonl", b'["text"]\n')
    assert 'line 1: no field "text"' in error_of("d.jsonl", b'{"text": 3}\n')
    assert "line 1: not JSON" in error_of("e.jsonl", b"[" * 100_000)
    error_of("cut.txt.gz", good[:-9])
    error_of("not.txt.gz", b"not gzip")
    error_of("cut.txt.xz", lzma.compress(PLAIN.encode())[:-9])
    error_of("not.txt.xz", b"not xz")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no file there ends in .txt"):
        read_documents(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no file there ends in .txt"):
        read_documents(str(tmp_path / "*.jpeg"))


def test_bad_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.compress(PLAIN.encode() * 100)
    for bad in (b"not zstandard", data[: len(data) // 2], data[:-1]):
        (tmp_path / "a.txt.zst").write_bytes(bad)
        with pytest.raises(ValueError, match="a.txt.zst"):
            list(read_documents(str(tmp_path / "a.txt.zst")))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert list(read_documents(str(tmp_path / "a.txt.zst"))) == ["one two"]  # two frames


@pytest.mark.parametrize(
    "module, name, extra",
    [("zstandard", "a.txt.zst", "zstd"), ("pyarrow.parquet", "a.parquet", "parquet")],
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=re.escape(f"pip install 'nanolm[{extra}]'")) as error:
        list(read_documents(str(tmp_path / name)))
    one_line(error)


def test_missing_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'nanolm[datasets]'")):
        list(read_documents("hf:some/name"))


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ValueError, match="Permission denied"):
        list(read_documents(str(path)))


@given(st.lists(st.text(min_size=1), max_size=30), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_split_is_a_partition_and_keeps_duplicates_together(texts, fraction):
    sides = {text: d.side(text, fraction) for text in texts}
    assert all(d.side(text, fraction) == sides[text] for text in texts)
    assert set(sides.values()) <= {"train", "val"}


def test_the_split_has_the_asked_size():
    texts = [str(i) for i in range(20_000)]
    share = sum(d.side(text, 0.05) == "val" for text in texts) / len(texts)
    assert abs(share - 0.05) < 0.006
    assert {d.side(text, 0.0) for text in texts} == {"train"}
    assert {d.side(text, 1.0) for text in texts} == {"val"}
    train = list(read_documents("fables:300", split="train"))
    val = list(read_documents("fables:300", split="val"))
    assert sorted(train + val) == sorted(fables(300)) and not set(train) & set(val)


def test_bad_split_or_fraction():
    for options in ({"split": "test"}, {"val_fraction": 1.5}, {"val_fraction": math.nan}):
        with pytest.raises(ValueError):
            read_documents("fables:1", **options)
    with pytest.raises(ValueError, match="no text to read"):
        read_documents([])


def test_documents_are_streamed():
    assert len(list(islice(read_documents("fables:1000000000"), 3))) == 3


# ---------------------------------------------------------------- shards


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_and_read_back(tmp_path):
    out = prepare("fables:80", tmp_path / "a" / "b", BYTES, workers=1, val_fraction=0.2)
    assert Tokenizer.load(out / "tokenizer.json").fingerprint == BYTES.fingerprint
    for split in ("train", "val"):
        data = TokenData(out, split, verify=True)
        texts = list(read_documents("fables:80", split=split, val_fraction=0.2))
        ids = [i for text in texts for i in (*BYTES.encode(text), BYTES.end_of_text)]
        assert data[:].tolist() == ids and len(data) == data.tokens == len(ids)
        floor = -sum(map(fable_log_prob, texts)) / len(ids)
        assert data.meta == {
            "tokenizer": BYTES.fingerprint,
            "dtype": "uint16",
            "floor": pytest.approx(floor, abs=1e-6),
            "documents": len(texts),
            "tokens": len(ids),
        }


def test_named_validation_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    out = prepare("fables:5", tmp_path / "out", BYTES, val_sources=["fables:3:9"], workers=1)
    assert TokenData(out, "train").meta["documents"] == 5
    assert BYTES.decode(TokenData(out, "val")[:20]) == next(fables(1, 9))[:20]
    assert TokenData(out, "val").meta["floor"] > 0
    out = prepare(
        "fables:5", tmp_path / "out", BYTES, val_sources=str(tmp_path / "a.txt"), workers=1
    )
    assert TokenData(out, "train").meta["floor"] is None
    assert BYTES.decode(TokenData(out, "val")[:]) == "some text" + END_OF_TEXT


def test_a_special_token_in_the_text_stays_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": f"a {END_OF_TEXT} b"}) + "\n")
    out = prepare(str(path), tmp_path / "out", BYTES, val_sources="fables:1", workers=1)
    assert (TokenData(out, "train")[:] == BYTES.end_of_text).sum() == 1


class Large(Tokenizer):
    """A tokenizer that says that it has more ids than two bytes can name."""

    vocab_size = (1 << 16) + 1


@pytest.mark.parametrize("size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_width_of_an_id(size, dtype, monkeypatch):
    monkeypatch.setattr(Large, "vocab_size", size)
    pieces = d.encode_documents(["abc"], "train", Large([]), 0.05, False)
    assert pieces["train"].ids.dtype == dtype and math.isnan(pieces["train"].log_prob)


def test_wide_ids_come_back(tmp_path, monkeypatch):
    narrow = folder_bytes(prepare("fables:20", tmp_path / "a", BYTES, workers=1, val_fraction=0.3))
    wide_encode = d.encode_documents

    def encode(*args):
        found = wide_encode(*args)
        return {k: d.Piece(p.ids.astype(np.uint32) + 70_000, p.log_prob) for k, p in found.items()}

    monkeypatch.setattr(d, "encode_documents", encode)
    out = prepare("fables:20", tmp_path / "b", BYTES, workers=1, val_fraction=0.3)
    data = TokenData(out, "train")
    assert data.meta["dtype"] == "uint32" and data[:].min() >= 70_000
    assert (data[:] - 70_000).astype("<u2").tobytes() == narrow["train-00000.bin"]
    assert Batches(data, 1, 8).batch(0)[0].min() >= 70_000


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(d, "CHUNK", 2000)
    tokenizer = Tokenizer.train(fables(50), 400)
    found = [
        folder_bytes(
            prepare("fables:120", tmp_path / str(n), tokenizer, workers=n, shard_tokens=7000)
        )
        for n in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) > 6


ENDINGS = [
    f"\n{END_OF_TEXT}\n",
    f"\n \t{END_OF_TEXT} \t\n\n\n",
    f"\r\n{END_OF_TEXT}\r\n",
    f"\r{END_OF_TEXT}\r",
    f"\n{END_OF_TEXT}\n{END_OF_TEXT}\n",
]


def large_text(path: Path) -> list[str]:
    """Write more than a megabyte of documents in a plain text file; returns them."""
    odd = ["狐は\n時計を見た。", f"x {END_OF_TEXT}\n{END_OF_TEXT} y", "\u3000\n ", "a\r\nb", "\n\n"]
    texts = [*fables(1200), *odd, *fables(900, 1)]
    ends = [ENDINGS[i % len(ENDINGS)] for i in range(len(texts) - 1)]
    whole = "".join(map("".join, zip(texts, [*ends, ""], strict=True)))
    path.write_bytes(b"\xef\xbb\xbf" + whole.encode())
    assert d.plain_files([str(path)]) == [path]
    return list(read_documents(str(path)))


@pytest.mark.parametrize("pattern", [GPT2_SPLIT, GPT4_SPLIT, r"\w+|\W+"])
@pytest.mark.parametrize("task", [1000, 3 << 20])
def test_a_plain_file_becomes_what_its_documents_become(tmp_path, monkeypatch, pattern, task):
    monkeypatch.setattr(d, "TASK", task)
    texts = large_text(tmp_path / "a.txt")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    tokenizer = Tokenizer.train(texts[:300], 600, pattern=pattern, workers=1)
    options = dict(shard_tokens=100_000, val_fraction=0.2)
    rows = prepare(str(tmp_path / "a.jsonl"), tmp_path / "rows", tokenizer, workers=1, **options)
    for n in (1, 2, 3):
        out = prepare(str(tmp_path / "a.txt"), tmp_path / str(n), tokenizer, workers=n, **options)
        assert folder_bytes(out) == folder_bytes(rows)
    assert TokenData(out, "train").meta["documents"] > 1000
    both = prepare(
        [tmp_path / "a.txt"], tmp_path / "both", tokenizer, val_sources=["fables:9"], workers=2
    )
    assert TokenData(both, "train").meta["documents"] == len(texts)
    assert TokenData(both, "val").meta["documents"] == 9


@pytest.mark.parametrize("task", [1, 3 << 20])
def test_files_and_parts_without_a_document_are_passed_over(tmp_path, monkeypatch, task):
    monkeypatch.setattr(d, "TASK", task)
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = large_text(folder / "a.txt")
    (folder / "b.txt").write_text("\n")
    (folder / "c.txt").write_text(f"{END_OF_TEXT}\n" * 9 + "the end\n")
    (folder / "d.txt").touch()
    out = prepare(folder, tmp_path / "out", BYTES, workers=1)
    found = [TokenData(out, split).meta["documents"] for split in ("train", "val")]
    assert sum(found) == len(texts) + 1
    assert list(read_documents(folder)) == [*texts, "the end"]


def test_small_files_share_a_task(tmp_path):
    for i, text in enumerate(fables(3000)):
        (tmp_path / f"{i:04}.txt").write_text(text)
    tasks = list(d.cut_sources([str(tmp_path)], GPT2_SPLIT, False))
    assert len(tasks) == 1 and len(tasks[0]) == 3000


@pytest.mark.parametrize("wrong", [b"a.txt", [3], ["fables", None]])
def test_a_source_is_a_name_or_a_path(tmp_path, wrong):
    for call in (lambda: read_documents(wrong), lambda: prepare(wrong, tmp_path / "o", BYTES)):
        with pytest.raises(ValueError, match="a source is a name or a path, not") as error:
            call()
        one_line(error)


def test_sources_may_come_one_by_one(tmp_path):
    names = ["fables:9", "fables:9:1"]
    given = (name for name in names)
    out = prepare(given, tmp_path / "out", BYTES, val_fraction=0.3, workers=1)
    both = [TokenData(out, split).meta["documents"] for split in ("train", "val")]
    assert sum(both) == 18


def test_what_is_wrong_with_a_plain_file_is_one_line(tmp_path):
    large_text(tmp_path / "a.txt")
    (tmp_path / "blank.txt").write_text("\n" * (2 << 20))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * (1 << 19))
    for name, said in [("blank", "there is no text in it"), ("latin", "not UTF-8 text")]:
        with pytest.raises(ValueError, match=rf"{name}\.txt: {said}") as error:
            prepare([tmp_path / "a.txt", tmp_path / f"{name}.txt"], tmp_path / "out", BYTES)
        one_line(error)
        assert not list((tmp_path / "out").iterdir())


def test_a_prepared_text_leaves_the_tokenizer_as_it_was(tmp_path):
    tokenizer = Tokenizer.train(fables(50), 400, workers=1)
    prepare("fables:60", tmp_path, tokenizer, workers=1)
    assert tokenizer._bulk is None  # else all that was learnt would stay in memory


def test_workers_do_not_run_the_callers_script_again(tmp_path):
    """A script without `if __name__ == "__main__"`, as most people write theirs."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "import nanolm.data as d\n"
        "from nanolm.tokenizer import Tokenizer\n"
        "d.CHUNK = 2000\n"
        f"d.prepare('fables:120', {str(tmp_path / 'out')!r}, Tokenizer([]), workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
    assert TokenData(tmp_path / "out", "train", verify=True).meta["documents"] > 100


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_shard_borders(tmp_path_factory, lengths, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    texts = [chr(97 + i) * n for i, n in enumerate(lengths)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = str(folder / "a.jsonl")
    options = dict(val_sources="fables:1", workers=1, shard_tokens=shard_tokens)
    out = prepare(source, folder / "out", BYTES, **options)
    data, whole = TokenData(out, "train", verify=True), []
    for text in texts:
        whole += [*BYTES.encode(text), BYTES.end_of_text]
    shards = sorted(out.glob("train-*.bin"))
    assert [p.stat().st_size // 2 for p in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    assert len(shards) == -(-len(whole) // shard_tokens)
    assert data[:].tolist() == whole and data.meta["documents"] == len(texts)
    for i in range(0, len(whole) + 3, 5):
        for j in range(0, len(whole) + 3, 7):
            assert data[i:j].tolist() == whole[i:j]
    assert data[-3:].tolist() == whole[-3:]


def test_slicing_returns_memory_of_its_own(tmp_path):
    data = TokenData(prepare("fables:30", tmp_path, BYTES, workers=1), "train")
    part = data[5:9]
    part[:] = 0  # does not reach the file, which is mapped read-only
    assert data[5:9].sum() > 0 and not isinstance(part, np.memmap)
    for wrong in (lambda: data[::2], lambda: data[5], lambda: list(data), lambda: 5 in data):
        with pytest.raises(ValueError, match=r"data\[i:j\]") as error:
            wrong()
        one_line(error)


def age(part: Path) -> None:
    """Make it look as if a run had left this folder, and all that is in it, two days ago."""
    part.mkdir(exist_ok=True)
    for path in (*part.iterdir(), part):
        os.utime(path, (time.time() - 2 * 86_400,) * 2)


def test_the_folder_of_a_run_that_is_still_alive_is_left_alone(tmp_path):
    age(tmp_path / ".part-old")
    age(tmp_path / ".part-alive")
    (tmp_path / ".part-alive" / "train-00000.bin").write_bytes(b"growing")
    os.utime(tmp_path / ".part-alive", (0, 0))  # a file grows, the folder does not change
    (tmp_path / ".part-empty").mkdir()
    prepare("fables:40", tmp_path, BYTES, workers=1)
    assert {path.name for path in tmp_path.glob(".part-*")} == {".part-alive", ".part-empty"}


def test_a_smaller_second_prepare_leaves_nothing_of_the_first(tmp_path):
    prepare("fables:60", tmp_path, BYTES, workers=1, shard_tokens=3000)
    (tmp_path / "notes-00000.json").write_text("mine")
    age(tmp_path / ".part-stale")
    prepare("fables:40", tmp_path, BYTES, workers=1)
    names = {"tokenizer.json", "notes-00000.json"}
    names |= {f"{s}-00000.{end}" for s in ("train", "val") for end in ("bin", "json")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_nothing_is_lost_when_the_second_prepare_fails(tmp_path, monkeypatch):
    out = prepare("fables:60", tmp_path / "out", BYTES, workers=1)
    before = folder_bytes(out)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnonsense')
    with pytest.raises(ValueError, match="line 2"):
        prepare(["fables:60", str(tmp_path / "bad.jsonl")], out, BYTES, workers=1)
    assert folder_bytes(out) == before

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(d.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare("fables:50", out, Tokenizer([(0, 1)]), workers=1)
    assert folder_bytes(out) == before


def children(pid: int) -> list[str]:
    """The processes that `pid` has started (Linux only, elsewhere none)."""
    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rpartition(")")[2].split()[1] == str(pid)
    ]


def test_no_half_file_after_a_kill(tmp_path):
    out = tmp_path / "out"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys, nanolm.data as d; from nanolm.tokenizer import Tokenizer; d.CHUNK = 5000;"
        "d.prepare('fables:10000000', sys.argv[1], Tokenizer([]), workers=2, shard_tokens=9000)"
    )
    for blow in (signal.SIGKILL, signal.SIGINT):
        stale = set(out.glob(".part-*"))
        for part in stale:
            age(part)
        quiet = {"stderr": subprocess.DEVNULL, "env": unmeasured()}
        child = subprocess.Popen([sys.executable, "-c", code, out], **quiet)
        for _ in range(600):
            if {path.parent for path in out.glob(".part-*/train-00003.bin")} - stale:
                break
            time.sleep(0.1)
        workers = children(child.pid)
        child.send_signal(blow)
        assert child.wait(60) != 0
        for _ in range(100):
            if not any(Path(f"/proc/{pid}").exists() for pid in workers):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the workers outlived the program that had started them")
        assert not [path for path in out.iterdir() if not path.name.startswith(".part-")]
        with pytest.raises(FileNotFoundError, match="prepare"):
            TokenData(out, "train")
    assert not list(out.iterdir())  # Ctrl-C cleans up, and the kill was two days before it
    prepare("fables:30", out, BYTES, workers=1)
    assert len(TokenData(out, "train", verify=True)) > 0


def test_bad_arguments_of_prepare(tmp_path):
    for options, said in [
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"workers": 0}, "workers"),
        ({"shard_tokens": 0}, "shard_tokens"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            prepare("fables:9", tmp_path / "out", BYTES, **options)
        one_line(error)
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare("gone.txt", tmp_path / "out", BYTES)
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare("fables:9", tmp_path / "out", BYTES, val_sources="gone.txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(ValueError, match="no document fell into (val|train), of 1") as error:
        prepare(str(tmp_path / "one.txt"), tmp_path / "out", BYTES)
    one_line(error)
    with pytest.raises(OSError, match="one.txt: this is a file; name a folder") as error:
        prepare("fables:9", tmp_path / "one.txt", BYTES)
    one_line(error)
    assert (tmp_path / "one.txt").read_text() == "only one document"


def test_workers_are_counted():
    assert d.count_workers(None) >= 1 and d.count_workers(3) == 3


def test_progress_is_shown_on_request(tmp_path, capsys):
    prepare("fables:30", tmp_path, BYTES, workers=1, progress=True)
    assert "documents" in capsys.readouterr().err
    prepare("fables:30", tmp_path, BYTES, workers=1)
    assert capsys.readouterr().err == ""


@pytest.fixture
def shards(tmp_path):
    return prepare("fables:60", tmp_path, BYTES, workers=1, shard_tokens=9000)


def refused(folder: Path, said: str, **options) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        TokenData(folder, "train", **options)
    one_line(error)


def test_damage_is_refused(shards):
    path = shards / "train-00001.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    refused(shards, "train-00001.bin: missing, or not 9000 tokens long")
    path.write_bytes(good + b"\0\0")
    refused(shards, "train-00001.bin")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    TokenData(shards, "train")  # the size is right
    refused(shards, "sha256", verify=True)
    path.unlink()
    refused(shards, "missing")
    path.write_bytes(good)
    assert TokenData(shards, "train", verify=True)
    (shards / "train-00001.json").unlink()
    refused(shards, "incomplete")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"shards": 9},
        {"dtype": "float64"},
        {"tokenizer": "another"},
        {"file": "train-00003.bin"},
        {"tokens": None},
        {"documents": "many"},
        {"sha256": None},
        {"floor": "low"},
        {"floor": [1]},
    ],
)
def test_strange_descriptions_are_refused(shards, change):
    path = shards / "train-00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(shards, "incomplete|missing")


@pytest.mark.parametrize("field", ["sha256", "floor", "tokens", "documents", "tokenizer", "dtype"])
def test_descriptions_that_lack_a_field_are_refused(shards, field):
    for path in shards.glob("train-*.json"):
        content = json.loads(path.read_text())
        del content[field]
        path.write_text(json.dumps(content))
    refused(shards, "incomplete")
    refused(shards, "incomplete", verify=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json", "\x00", "3"])
def test_broken_descriptions_are_refused(shards, text):
    (shards / "train-00000.json").write_text(text)
    refused(shards, "incomplete")


def test_no_shards_here(tmp_path):
    refused(tmp_path, "prepare them first")
    refused(tmp_path / "gone", "prepare them first")


# ---------------------------------------------------------------- batches


class Row(TokenData):
    """Token data that only counts: token i is i."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __getitem__(self, key):
        return np.arange(self.tokens, dtype=np.uint32)[key]


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 5), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_every_epoch_covers_every_window_once(batch_size, seq_len, seed, extra):
    data = Row(seq_len * (batch_size + 1) + extra)
    batches = Batches(data, batch_size, seq_len, seed=seed)
    n = batches.windows
    used = []
    for i in range(-(-3 * n // batch_size)):
        inputs, targets = batches.batch(i)
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1) and targets.max() < len(data)
        assert batches.epoch(i) == i * batch_size // n
        used += inputs[:, 0].tolist()
    for epoch in range(3):
        starts = sorted(used[epoch * n : (epoch + 1) * n])
        assert all(b - a == seq_len for a, b in zip(starts, starts[1:], strict=False))
        assert len(starts) == n and 0 <= starts[0] < seq_len
    assert len(data) - n * seq_len < 2 * seq_len  # what an epoch leaves out


def test_orders_and_offsets_differ_by_epoch_and_seed():
    data = Row(100_000)
    one, other = Batches(data, 4, 100), Batches(data, 4, 100, seed=1)
    assert one.starts(0).tolist() != other.starts(0).tolist()
    assert len({int(one.starts(e).min()) for e in range(8)}) > 4
    assert one.starts(0).tolist() != one.starts(1).tolist()
    seen = {int(s) for e in range(200) for s in one.starts(e)}
    assert len(seen) > 60_000  # windows come to begin nearly everywhere


def test_a_batch_is_a_pure_function_of_seed_and_number(shards):
    data = TokenData(shards, "train")
    one = Batches(data, 3, 50, seed=4)
    forward = [one.batch(i) for i in range(40)]
    for i in (39, 0, 17, 3):
        again = Batches(TokenData(shards, "train"), 3, 50, seed=4).batch(i)
        assert all(torch.equal(a, b) for a, b in zip(again, forward[i], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.batch(i), forward[i], strict=True))


def test_there_is_no_batch_before_the_first():
    with pytest.raises(ValueError, match="no batch -1: batches are counted from 0") as error:
        Batches(Row(1000), 2, 10).batch(-1)
    one_line(error)


def test_batches_never_change():
    """The order is part of what a seed means: a resumed run must go on the same."""
    starts = Batches(Row(1000), 2, 10, seed=1337).starts(0)
    assert starts[:8].tolist() == FROZEN


FROZEN = [862, 812, 542, 252, 422, 522, 832, 332]


@pytest.mark.parametrize("seed", [0, -1, 2**32, 2**63, 10**30])
def test_any_whole_number_is_a_seed(seed):
    assert Batches(Row(500), 2, 10, seed=seed).batch(3)[0].shape == (2, 10)


def test_too_short_or_senseless(shards):
    with pytest.raises(
        ValueError, match="shorter than one batch: 20 tokens make 1 windows"
    ) as error:
        Batches(Row(20), 2, 10)
    one_line(error)
    for tokens in (0, 1, 10):
        with pytest.raises(ValueError, match="shorter than one batch"):
            Batches(Row(tokens), 1, 10)
    assert Batches(Row(11), 1, 10).batch(7)[1].tolist() == [list(range(1, 11))]
    for batch_size, seq_len in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="at least 1"):
            Batches(Row(100), batch_size, seq_len)


# ---------------------------------------------------------------- the module


def test_import_is_light():
    """Workers import this module: it must not pull in torch, nor the optional libraries."""
    heavy = {"torch", "datasets", "pyarrow", "zstandard"}
    code = f"import sys, nanolm.data; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n"


def test_pairs_of_options_differ():
    for rule in d.grammar().values():
        for table in rule.tables.values():
            assert all(a.parts != b.parts for a, b in combinations(table, 2))
