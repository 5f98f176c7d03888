"""The command line as its users meet it: what works, and what each mistake is told."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apart import unmeasured

import nanolm.__main__ as front
from nanolm.__main__ import main

TINY = "--n-layer 1 --d-model 16 --d-ff 16 --n-head 2 --n-kv-head 1 --max-seq-len 32"
PACE = "--steps 12 --warmup-steps 2 --eval-every 6 --log-every 3 --checkpoint-every 6"
SHORT = f"--vocab-size 300 --batch-size 4 {PACE}"


@pytest.fixture(autouse=True)
def no_history(tmp_path, monkeypatch):
    """Sessions write their history here, not at home."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run called `first`."""
    folder = tmp_path_factory.mktemp("command")
    code = main(f"train --data fables:60 --name first --runs-dir {folder} {TINY} {SHORT}".split())
    assert code == 0
    return folder


def test_it_starts_without_the_compiler():
    code = (
        "import sys, nanolm.__main__; print(*{'torch._inductor', 'torch._dynamo'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def refused(capsys, argv):
    """Run a command that must be refused; return its one line."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2, shown
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and "error" in lines[0], shown.err
    return lines[0]


def test_a_run_is_trained_resumed_and_continued(trained, capsys, tmp_path):
    shutil.copytree(trained / "first", tmp_path / "first")
    steps = f"train --name first --runs-dir {tmp_path} --resume --steps 15"
    assert main(steps.split()) == 0
    assert "step 15/15" in capsys.readouterr().out
    assert (tmp_path / "first" / "step-000015").is_dir()


def test_sampling_is_seeded_and_speaks_json(trained, capsys):
    argv = [
        "sample",
        str(trained / "first"),
        "--prompt",
        "Once",
        "--max-tokens",
        "6",
        "--seed",
        "3",
    ]
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert main([*argv, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and texts[0]["prompt"] == "Once" and texts[0]["step"] == 12
    assert main([*argv, "--prompt", "The fox"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once" + texts[0]["text"]) and "The fox" in out


def test_a_person_is_asked_for_prompts(trained, capsys, monkeypatch):
    typed = iter(["The hen", EOFError()])

    def answer(prompt):
        word = next(typed)
        if isinstance(word, Exception):
            raise word
        return word

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["sample", str(trained / "first"), "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The hen")


def rows_of(capsys, *words):
    """The JSON lines that a command prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts_from_a_file_are_one_batch(trained, capsys, tmp_path):
    run, given = trained / "first", ["Once", "The hen \u00e9", "Long ago"]
    (tmp_path / "p.txt").write_text("\n\n".join(given) + "\n", encoding="utf-8")
    lines = [json.dumps({"prompt": given[0]}), *map(json.dumps, given[1:])]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    argv = ["sample", run, "--max-tokens", 5, "--seed", 2, "--json"]
    rows = rows_of(capsys, *argv, "--prompts", tmp_path / "p.txt", "--logprobs", 2)
    assert [row["prompt"] for row in rows] == given
    for row in rows:
        assert len(row["logprobs"]) == row["tokens"] and len(row["logprobs"][0]["top"]) == 2
        assert row["logprob"] == pytest.approx(sum(x["logprob"] for x in row["logprobs"]))
        alone = rows_of(capsys, *argv, "--prompt", row["prompt"])[0]
        assert alone["text"] == row["text"] and "logprobs" not in alone
    plain = [{k: v for k, v in row.items() if k != "logprobs"} for row in rows]
    again = rows_of(capsys, *argv, "--prompts", tmp_path / "p.jsonl", "--batch-size", 2)
    assert [row["text"] for row in again] == [row["text"] for row in plain]
    pieces = rows_of(capsys, *argv, "--prompts", tmp_path / "p.txt", "--stream")
    for i, row in enumerate(rows):
        mine = [piece for piece in pieces if piece["index"] == i]
        assert "".join(piece["text"] for piece in mine) == row["text"]
        assert [piece["finish"] for piece in mine][-1] == row["finish"]


def test_a_box_around_each_text(trained, capsys):
    words = f"sample {trained / 'first'} --prompt Once --prompt Twice --box --max-tokens 5 --seed 1"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("┌") for line in lines) == 2 and {len(x) for x in lines} == {72}


def test_the_newest_run_is_the_default(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nanolm train --preset pocket" in refused(capsys, ["sample", "--prompt", "x"])
    for age, name in ((50, "old"), (10, "new"), (90, "older")):
        shutil.copytree(trained / "first", tmp_path / "runs" / name)
        for step in (tmp_path / "runs" / name).glob("step-*"):
            os.utime(step, (time.time() - age,) * 2)
    (tmp_path / "runs" / "begun").mkdir()
    assert front.newest_run() == Path("runs/new")
    assert main(["sample", "--prompt", "Once", "--max-tokens", "1"]) == 0


@pytest.mark.parametrize("how", [[], ["--json"], ["--box"]])
def test_a_diverged_model_is_one_line(trained, capsys, monkeypatch, how):
    def diverged(*args, **options):
        found = load(*args, **options)
        found.model.norm.weight.data.fill_(float("nan"))
        return found

    load = front.load_checkpoint
    monkeypatch.setattr(front, "load_checkpoint", diverged)
    words = ["sample", trained / "first", "--prompt", "Once", *how]
    assert "the model has diverged" in refused(capsys, words)


def test_outgrowing_the_context_is_told(trained, capsys):
    words = f"sample {trained / 'first'} --prompt Once --max-tokens 90 --seed 1 --stop-tokens !"
    assert main(words.split()) == 0
    told = capsys.readouterr().err
    assert told.count("outgrown the context") == 1 and "last 16 to 32 tokens" in told
    assert "ask for at most" in refused(capsys, [*words.split(), "--context", "refuse"])


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal of Unix")
def test_a_session_on_a_terminal(trained, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    environment = unmeasured(XDG_STATE_HOME=str(tmp_path), TERM="dumb")
    environment |= {"PYTHONPATH": str(Path(front.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    words = ["-m", "nanolm", "sample", str(trained / "first"), "--max-tokens", "4", "--seed", "1"]
    options = {"encoding": "utf-8", "timeout": 180, "env": environment, "echo": False}

    def begin():
        session = pexpect.spawn(sys.executable, words, **options)
        session.expect("ends the session")
        session.expect("> ")
        return session

    session = begin()
    session.sendline("The hen")
    session.expect("The hen[^\r]+\r\n\r\n")
    first = session.match.group().strip()
    session.sendline("/top-p 7")
    session.expect("top_p must be more than 0")
    session.sendline("/tempratur 1")
    session.expect("did you mean --temperature")
    session.sendline("hen " * 200)
    session.expect("a prompt has 1 to 32 tokens")
    session.sendline("/max-tokens 100000000")
    session.expect("max_tokens=100000000")
    session.sendline("")  # go on
    session.expect("outgrown the context")
    session.sendintr()
    session.expect("> ")
    session.sendline("/")
    session.expect("max_tokens=100000000")
    session.expect("> ")  # what is typed before the prompt may be lost
    session.sendeof()
    session.expect(pexpect.EOF)
    session.close()
    assert session.exitstatus == 0 and first.startswith("The hen")
    assert "The hen" in (tmp_path / "nanolm" / "history").read_text().splitlines()
    session = begin()
    session.send("\x1b[A\r")  # the last line that was typed, in the session before
    session.expect("max_tokens=4,")
    session.expect("> ")
    session.sendeof()
    session.expect(pexpect.EOF)
    session.close()


def test_tokenizer_commands_agree_with_the_library(trained, capsys, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", "fables:40", "--vocab-size", "280", "--out", str(path)]) == 0
    tokenizer = front.Tokenizer.load(path)
    assert tokenizer.vocab_size == 280
    capsys.readouterr()
    assert main(["tokenizer", "encode", str(path), "the hen", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ids"] == tokenizer.encode("the hen") and "".join(found["pieces"]) == "the hen"
    words = " ".join(map(str, found["ids"]))
    assert main(["tokenizer", "decode", str(path), words]) == 0
    assert capsys.readouterr().out == "the hen\n"
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert main(["tokenizer", "encode", str(path)]) == 0
    end = front.Tokenizer.load(path).end_of_text
    assert main(["tokenizer", "encode", str(path), "<|endoftext|>", "--special"]) == 0
    assert capsys.readouterr().out.split()[0] == str(end)


def test_data_commands_prepare_describe_and_show(trained, capsys, tmp_path):
    tokenizer = trained / "first" / "tokenizer.json"
    out = tmp_path / "shards"
    argv = [
        "data",
        "prepare",
        "fables:60",
        "--tokenizer",
        tokenizer,
        "--out",
        out,
        "--workers",
        "1",
    ]
    assert main([str(word) for word in argv]) == 0
    assert main(["data", "info", str(out)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[:2] == rows[2:] and [row["split"] for row in rows[:2]] == ["train", "val"]
    assert sum(row["documents"] for row in rows[:2]) == 60 and rows[0]["floor"] > 0
    assert main(["data", "show", "fables:5", "--count", "2"]) == 0
    assert capsys.readouterr().out.count("\n\n") == 2


def test_plot_draws_in_letters_and_pixels(trained, capsys, tmp_path):
    run = str(trained / "first")
    assert main(["plot", run]) == 0
    shown = capsys.readouterr().out
    assert "first train" in shown and "first floor" in shown and "\x1b" not in shown
    assert max(map(len, shown.splitlines()[:20])) <= 80
    assert (trained / "first" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", run, run, "--out", str(tmp_path / "two.png")]) == 0


MISTAKES = {
    "train --stepz 3": "did you mean --steps",
    "train --steps many": "invalid int",
    "train --steps 0": "steps must be",
    "train --steps 100": "warmup_steps",
    "train --n-head 3": "multiple",
    "train --vocab-size 100 --data fables:50": "vocab_size 100",
    "train --preset huge": "invalid choice",
    "train --data nowhere.txt": "nowhere.txt",
    "train --data empty.txt": "empty",
    "train --data short.txt --vocab-size 300": "shorter than one batch|no document",
    "train --data fables:50 --tokenizer broken.json": "broken.json",
    "train --name nobody --resume": "nobody",
    "train --device cuda:99": "cuda",
    "sample nobody": "nobody",
    "sample nobody --temperature -1": "temperature|nobody",
    "sample --top-p 2": "top_p must be",
    "sample": "no run in runs|nanolm train",
    "sample --prompts nowhere.txt": "nowhere.txt",
    "sample --prompts empty.txt": "a prompt in every line",
    "sample --prompts bad.jsonl": "bad.jsonl",
    "sample --prompts notes.pdf": "UTF-8",
    "sample --prompt x --logprobs -1": "logprobs",
    "sample --prompt x --logprobs 2": "--logprobs is for --json",
    "sample --prompt x --json --stream --logprobs 2": "without --stream",
    "sample --prompt x --json --box": "not both",
    "sample --prompt x --batch-size 0": "batch-size",
    "serve --port many": "invalid int",
    "tokenizer train nowhere.txt": "nowhere.txt",
    "tokenizer train empty.txt": "empty",
    "tokenizer train fables:9 --vocab-size 255": "255",
    "tokenizer encode broken.json hello": "broken.json",
    "tokenizer": "ACTION",
    "data info nowhere": "nowhere",
    "data show notes.pdf": "notes.pdf",
    "plot nobody": "no run in nobody",
    "trian": "did you mean train",
    "train --steps 9 --horns 2": "see nanolm train --help",
    "fly": "invalid choice",
    "": "COMMAND",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_each_mistake_gets_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree\n")
    Path("broken.json").write_text('{"format": "nanolm-tokenizer", "version": 1, "mer')
    Path("notes.pdf").write_bytes(b"%PDF\xff")
    Path("bad.jsonl").write_text('{"prompt": 3}')
    before = sorted(Path().rglob("*"))
    line = refused(capsys, words.split())
    assert re.search(MISTAKES[words], line), line
    left = [p for p in Path().rglob("*") if p not in before and p.is_file()]
    assert not left, "a refused command leaves nothing behind"


def test_mistakes_with_a_run(trained, capsys, tmp_path):
    shutil.copytree(trained / "first", tmp_path / "first")
    where = ["--name", "first", "--runs-dir", tmp_path]
    again = f"train --data fables:60 {TINY} {SHORT}".split()
    assert "already" in refused(capsys, [*again, *where])
    shape = refused(capsys, ["train", "--resume", "--d-model", "32", *where])
    assert "d_model" in shape
    tokenizer = tmp_path / "first" / "tokenizer.json"
    assert "999" in refused(capsys, ["tokenizer", "decode", tokenizer, "1 999"])
    assert "'two' is not a token id" in refused(capsys, ["tokenizer", "decode", tokenizer, "1 two"])
    assert "cuda:77" in refused(capsys, ["sample", tmp_path / "first", "--device", "cuda:77"])
    run = tmp_path / "first"
    assert "top_p" in refused(capsys, ["sample", run, "--top-p", "2"])
    (run / "metrics.jsonl").unlink()
    assert "no measurements" in refused(capsys, ["plot", run])


def test_piped_text_is_the_prompt(trained):
    done = run_module(
        ["sample", str(trained / "first"), "--max-tokens", "2", "--json"], input="The hen\n"
    )
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "The hen"


def test_a_person_may_try_another_prompt(trained, capsys, monkeypatch):
    typed = iter(["hen " * 400, "The fox"])

    def answer(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["sample", str(trained / "first"), "--max-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("The fox") and "a prompt has" in shown.err


def test_few_letters_lose_nothing(tmp_path):
    argv = f"train --data fables:60 --name ascii --runs-dir {tmp_path} {TINY} {SHORT}".split()
    done = run_module(argv, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ascii" / "step-000012").is_dir()


def test_an_interrupted_run_is_not_a_finished_one(tmp_path, monkeypatch):
    def cut(model, config, **options):
        from dataclasses import replace

        from nanolm.train import train

        return train(model, replace(config, steps=6), **options)

    monkeypatch.setattr(front, "train", cut)
    argv = f"train --data fables:60 --name cut --runs-dir {tmp_path} {TINY} {SHORT}".split()
    assert main(argv) == 130


def test_debug_lets_the_error_through(monkeypatch):
    monkeypatch.setenv("NANOLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", "nobody"])


def test_interrupting_says_so(capsys):
    def stop():
        raise KeyboardInterrupt

    assert front.guarded(stop) == 130
    assert capsys.readouterr().err == "nanolm: interrupted\n"


def run_module(words, **options):
    return subprocess.run(
        [sys.executable, "-m", "nanolm", *words],
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


def test_as_a_program():
    done = run_module(["sample", "nobody"])
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"nanolm: error: .*nobody.*\n", done.stderr)
    helped = run_module(["train", "--help"])
    assert helped.returncode == 0
    for flag in ("--n-kv-head", "--warmup-steps", "--no-compile", "--resume"):
        assert flag in helped.stdout


def test_a_reader_who_leaves_is_no_error():
    command = f"{sys.executable} -m nanolm data show fables:5000 --count 5000 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("\n")
