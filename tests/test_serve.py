"""The server as its clients meet it: many at once, rude ones, a browser, and Ctrl-C."""

import contextlib
import http.client
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from apart import ROOT, unmeasured
from seeded import one_seed  # noqa: F401
from test_book_pages import Browser, needs_browser
from test_sample import small_model

from nanolm.batch import generate_batch
from nanolm.sample import SampleConfig, generate
from nanolm.serve import Engine, serving
from nanolm.tokenizer import Tokenizer

BYTES = Tokenizer((), special_tokens=())  # without an end of text: a text may go on for ever
JSON = {"Content-Type": "application/json"}
ENDLESS = {"prompt": "ab", "max_tokens": 10**9, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return small_model(max_seq_len=64).double()  # in which company does not even round


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, BYTES, rows=16, limit=200)


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, "tiny") as found:
        yield found


def exchange(url, body=None, path="/v1/completions", headers=JSON, method=None):
    """Status, headers and body of one request."""
    host = url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        data = json.dumps(body) if isinstance(body, (dict, list, int)) else body
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()


def ask(url, **body):
    status, _, data = exchange(url, body)
    assert status == 200, data
    return json.loads(data)


def events(url, **body):
    status, headers, data = exchange(url, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    parts = data.decode().split("\n\n")
    assert parts.pop() == "" and parts.pop() == "data: [DONE]"
    assert all(part.startswith("data: {") for part in parts)
    return [json.loads(part[6:]) for part in parts]


def error_of(reply):
    status, headers, data = reply
    assert headers["content-type"] == "application/json"
    error = json.loads(data)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return status, error


def health(url):
    return json.loads(exchange(url, path="/health")[2])


def soon(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---- many at once


def test_sixty_four_at_once_and_none_lost(url, model):
    """More than rows; half of them streams, each with settings of its own."""

    def client(i):
        body = {"prompt": "ab" * (i % 7 + 1), "max_tokens": 5 + i % 30, "seed": i}
        body |= [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.5, "min_p": 0.1}][i % 4]
        start.wait()
        if i % 2:
            return body, "".join(e["choices"][0]["text"] for e in events(url, **body))
        return body, ask(url, **body)["choices"][0]["text"]

    start = threading.Barrier(64)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(client, range(64)))
    for body, text in answers:
        options = {"temperature": 1.0} | {k: v for k, v in body.items() if k != "prompt"}
        assert text == generate(model, BYTES, body["prompt"], SampleConfig(**options))
    assert health(url) == {"status": "ok", "rows": 16, "busy": 0, "open": 0}


def test_beyond_the_limit_some_are_told_to_come_back(url):
    status, error = error_of(exchange(url, {"prompt": "a", "n": 200, "model": None, "echo": 1}))
    assert status == 400 and "echo must be bool" in error["message"]
    with ThreadPoolExecutor(3) as pool:
        tries = [pool.submit(exchange, url, {"prompt": "a", "n": 90}) for _ in range(3)]
        codes = [done.result()[0] for done in tries]
    assert set(codes) <= {200, 503} and 200 in codes
    status, error = error_of(exchange(url, {"prompt": ["a"] * 3, "n": 100}))
    assert status == 400 and "at most 200 texts in one request, not 300" in error["message"]
    assert soon(lambda: not health(url)["open"])


def test_busy_is_503_and_passes(url):
    with contextlib.closing(raw_stream(url, ENDLESS | {"n": 150})):
        assert soon(lambda: health(url)["open"] == 150)
        status, error = error_of(exchange(url, {"prompt": "a", "n": 60}))
        assert status == 503 and error["type"] == "server_error" and "busy" in error["message"]
    assert soon(lambda: not health(url)["open"])
    assert ask(url, prompt="a", n=60, max_tokens=1)["usage"]["prompt_tokens"] == 60


# ---- who goes away


def raw_stream(url, body, read=True):
    """The socket of a client that has sent a request and, unless told otherwise, read a little."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps({"stream": True} | body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client = socket.create_connection((host, int(port)), timeout=60)
    client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    seen = b""
    while read and b"data: {" not in seen:
        seen += client.recv(1000)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(url, stream):
    body = ENDLESS | {"stream": stream}
    clients = [raw_stream(url, body, read=stream and i < 16) for i in range(20)]
    assert soon(lambda: health(url)["busy"] == 16 and health(url)["open"] == 20)
    for client in clients[5:]:
        client.close()
    assert soon(lambda: health(url)["open"] == 5)
    assert ask(url, prompt="ab", max_tokens=3)["choices"][0]["finish_reason"]
    for client in clients[:5]:
        client.close()
    assert soon(lambda: health(url)["open"] == 0) and health(url)["busy"] == 0


def test_a_stream_that_nobody_reads_is_given_up(url, monkeypatch):
    monkeypatch.setattr("nanolm.serve.MOST_UNREAD", 50)
    much = ENDLESS | {"logprobs": 20, "n": 16}  # some megabytes fit between server and client
    with contextlib.closing(raw_stream(url, much)) as client:
        assert soon(lambda: health(url)["open"] == 0, seconds=60)
        seen = b""
        while b"[DONE]" not in seen:
            seen = seen[-400:] + client.recv(1 << 20)
        assert b"too slow" in seen


# ---- the format


def test_the_answer_and_the_stream_say_the_same(url, model):
    body = {"prompt": "abc", "max_tokens": 20, "seed": 3, "logprobs": 4, "temperature": 1.5}
    whole = ask(url, **body)
    assert whole["object"] == "text_completion" and whole["model"] == "tiny"
    assert whole["id"].startswith("cmpl-") and abs(whole["created"] - time.time()) < 60
    choice = whole["choices"][0]
    assert {"index": 0, "finish_reason": "length"}.items() <= choice.items()
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    parts = events(url, **body, stream_options={"include_usage": True})
    assert parts.pop()["usage"] == whole["usage"]
    pieces = [part["choices"][0] for part in parts]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    for key, values in choice["logprobs"].items():
        assert sum((piece["logprobs"][key] for piece in pieces), []) == values and len(values) == 20
    config = SampleConfig(max_tokens=20, seed=3, temperature=1.5)
    got = generate_batch(model, BYTES, ["abc"], config, alternatives=4)[0]
    assert choice["logprobs"]["token_logprobs"] == [token.logprob for token in got.tokens]
    assert choice["logprobs"]["text_offset"] == [token.start for token in got.tokens]
    for token, top, spelt in zip(
        got.tokens, choice["logprobs"]["top_logprobs"], choice["logprobs"]["tokens"], strict=True
    ):
        assert list(top.values()) == [t.logprob for t in token.top] and len(top) == 4
        data = BYTES.token_bytes(token.id)
        assert spelt == (chr(data[0]) if data[0] < 128 else f"bytes:\\x{data[0]:02x}")


def test_prompts_and_n_and_echo_and_ids(url, model):
    body = {"max_tokens": 4, "temperature": 0}
    two = ask(url, prompt=["ab", "cd"], n=2, **body)
    assert [c["index"] for c in two["choices"]] == [0, 1, 2, 3]
    assert two["choices"][0]["text"] == two["choices"][1]["text"]  # greedy
    alone = ask(url, prompt="cd", **body)["choices"][0]["text"]
    assert two["choices"][2]["text"] == alone
    assert ask(url, prompt=BYTES.encode("cd"), **body)["choices"][0]["text"] == alone
    assert ask(url, prompt=[BYTES.encode("cd")], **body)["choices"][0]["text"] == alone
    assert ask(url, prompt="cd", echo=True, **body)["choices"][0]["text"] == "cd" + alone
    streamed = events(url, prompt="cd", echo=True, **body)
    assert "".join(e["choices"][0]["text"] for e in streamed) == "cd" + alone
    assert ask(url, prompt="xycd", truncate_prompt_tokens=2, **body)["choices"][0]["text"] == alone
    seeds = ask(url, prompt="ab", n=3, seed=5, max_tokens=12)["choices"]
    assert len({c["text"] for c in seeds}) == 3
    assert ask(url, prompt="ab", seed=6, max_tokens=12)["choices"][0]["text"] == seeds[1]["text"]
    nothing = ask(url, prompt="ab", max_tokens=0, echo=True)
    assert nothing["choices"][0]["text"] == "ab" and nothing["usage"]["completion_tokens"] == 0
    assert events(url, prompt="ab", max_tokens=0)[-1]["choices"][0]["finish_reason"] == "length"


def test_stops(url, model):
    text = generate(model, BYTES, "ab", SampleConfig(temperature=0, max_tokens=30))
    at = next(i for i in range(4, 20) if text.find(text[i : i + 2]) == i)
    for stop in (text[at : at + 2], [text[at : at + 2], "never"]):
        found = ask(url, prompt="ab", temperature=0, max_tokens=30, stop=stop, logprobs=0)
        choice = found["choices"][0]
        assert choice["text"] == text[:at] and choice["finish_reason"] == "stop"
        assert all(start < at for start in choice["logprobs"]["text_offset"])
    said = [e["choices"][0]["text"] for e in events(url, prompt="ab", temperature=0, stop=stop)]
    assert "".join(said) == text[:at]
    slid = ask(url, prompt="ab", temperature=0, max_tokens=90)["choices"][0]
    assert slid["slid"] or slid["finish_reason"] == "stop"


def test_models_and_the_page(url):
    status, _, data = exchange(url, path="/v1/models")
    card = json.loads(data)["data"][0]
    assert status == 200 and card["id"] == "tiny" and card["max_model_len"] == 64
    assert json.loads(exchange(url, path="/v1/models/tiny")[2]) == card
    status, headers, page = exchange(url, path="/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert not re.findall(rb"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)


@pytest.mark.skipif(not importlib.util.find_spec("openai"), reason="openai is not installed")
def test_the_official_client(url):
    import openai

    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    body = dict(model="tiny", prompt="abc", max_tokens=6, seed=1)
    whole = client.completions.create(**body, logprobs=2, extra_body={"min_p": 0.1})
    assert whole.usage.completion_tokens == 6 and len(whole.choices[0].logprobs.tokens) == 6
    parts = client.completions.create(**body, stream=True, extra_body={"min_p": 0.1})
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="top_p must be"):
        client.completions.create(**body, top_p=3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**(body | {"model": "gpt"}))


# ---- what is refused


BAD = {
    '{"top_p": 0}': (400, "top_p", "top_p must be"),
    '{"top_p": 1.5}': (400, "top_p", "top_p must be"),
    '{"min_p": -1}': (400, "min_p", "min_p must be"),
    '{"temperature": -1}': (400, "temperature", "temperature must be"),
    '{"temperature": NaN}': (400, "temperature", "temperature must be"),
    '{"temperature": "hot"}': (400, "temperature", "int or float, not str"),
    '{"top_k": 2.5}': (400, "top_k", "must be int"),
    '{"repetition_penalty": 0}': (400, "repetition_penalty", "must be positive"),
    '{"max_tokens": -1}': (400, "max_tokens", "zero or more"),
    '{"seed": -3}': (400, "seed", "at least 0"),
    '{"n": 0}': (400, "n", "n must be from 1"),
    '{"n": 1000000}': (400, "n", "n must be from 1"),
    '{"logprobs": 21}': (400, "logprobs", "from 0 to 20"),
    '{"logprobs": true}': (400, "logprobs", "must be int, not bool"),
    '{"stop": [""]}': (400, "stop", "none empty"),
    '{"stop": [3]}': (400, "stop", "tuple of strings"),
    '{"prompt": "a", "stop_tokens": ["END"]}': (400, "stop_tokens", "unknown stop token"),
    '{"context": "roll"}': (400, "context", "slide or refuse"),
    '{"prompt": "a", "context": "refuse", "max_tokens": 64}': (
        400,
        "prompt",
        "do not fit the context",
    ),
    '{"prompt": ""}': (400, "prompt", "prompt is empty"),
    '{"prompt": []}': (400, "prompt", "prompt must be"),
    '{"prompt": {}}': (400, "prompt", "str or list"),
    '{"prompt": [1, -2]}': (400, "prompt", "prompt must be"),
    '{"prompt": [257]}': (400, "prompt", "prompt must be"),
    '{"prompt": ["a", 3]}': (400, "prompt", "prompt must be"),
    '{"prompt": "%s"}' % ("x" * 65): (400, "prompt", "1 to 64 tokens"),
    '{"truncate_prompt_tokens": 0}': (400, "truncate_prompt_tokens", "from 1 to 64"),
    '{"best_of": 4}': (400, "best_of", "not supported"),
    '{"logit_bias": {"5": 1}}': (400, "logit_bias", "not supported"),
    '{"tempreature": 1}': (400, "tempreature", "did you mean temperature"),
    '{"echo": true, "logprobs": 1}': (400, "echo", "not supported"),
    '{"model": "gpt"}': (404, "model", "no model 'gpt'"),
    "[1, 2]": (400, None, "JSON object"),
    "{": (400, None, "not JSON"),
    "": (400, None, "not JSON"),
    "[" * 100000: (400, None, "not JSON"),
}


@pytest.mark.parametrize("body", BAD, ids=lambda body: body[:30] or "nothing")
def test_bad_bodies(url, body):
    code, param, words = BAD[body]
    for stream in ("", ', "stream": true}'):
        sent = re.sub(r"\}$", stream, body, count=1) if stream and body[:2] == '{"' else body
        status, error = error_of(exchange(url, sent))
        assert status == code and error["param"] == param and words in error["message"]
        assert error["type"] == "invalid_request_error"


def test_null_is_not_given(url):
    assert ask(url, prompt="ab", seed=None, stop=None, logprobs=None, suffix=None, max_tokens=1)


def test_bad_envelopes(url):
    status, error = error_of(exchange(url, b'{"prompt": "\xff"}'))
    assert status == 400 and "not JSON" in error["message"]
    status, _ = error_of(exchange(url, "{}", headers={"Content-Type": "text/plain"}))
    assert status == 415  # what a page from elsewhere may send without asking
    status, error = error_of(exchange(url, json.dumps({"prompt": "x" * (1 << 20)})))
    assert status == 413
    for path, method, code in (("/v2", "GET", 404), ("/v1/completions", "GET", 405)):
        status, error = error_of(exchange(url, path=path, method=method))
        assert status == code and path in error["message"]
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        status, error = error_of(exchange(url, path="/health", headers={"Host": host}))
        assert status == 403 and "host" in error["message"]
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "[::1]", "LOCALHOST:1"):
        assert exchange(url, path="/health", headers={"Host": host})[0] == 200
    allowed = exchange(url, "{}", headers=JSON | {"Origin": "https://evil.example"})[1]
    assert not any(name.lower().startswith("access-control") for name in allowed)


def test_a_diverged_model_is_an_error_and_no_end(url, model):
    weight = model.blocks[0].attn.v_proj.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    status, error = error_of(exchange(url, {"prompt": ["ab" * 20] * 2}))
    assert status == 500 and error["type"] == "server_error" and "diverged" in error["message"]
    assert "diverged" in events(url, prompt="ab")[-1]["error"]["message"]
    with torch.no_grad():
        weight.copy_(good)
    config, prompts = SampleConfig(temperature=0, max_tokens=9), ["ab", "ab" * 15]
    found = ask(url, prompt=prompts, temperature=0, max_tokens=9)["choices"]
    assert [c["text"] for c in found] == [generate(model, BYTES, p, config) for p in prompts]


def test_a_server_that_stops_tells_those_who_wait(model):
    engine = Engine(model, BYTES, rows=1)
    with serving(engine) as url:
        with contextlib.closing(raw_stream(url, ENDLESS)) as first, ThreadPoolExecutor(1) as pool:
            second = pool.submit(exchange, url, ENDLESS)  # waits in line
            assert soon(lambda: health(url)["open"] == 2)
            engine.stop()
            assert second.result()[0] == 503
            last = b""
            while chunk := first.recv(1 << 16):
                last = (last + chunk)[-400:]
                if b"[DONE]" in last:
                    break
            assert b"the server was stopped" in last
            assert error_of(exchange(url, {"prompt": "a"}))[0] == 503
    with pytest.raises(OSError):
        exchange(url, path="/health")


# ---- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from nanolm.__main__ import main

    folder = tmp_path_factory.mktemp("runs")
    shape = "--n-layer 1 --d-model 16 --d-ff 16 --n-head 2 --n-kv-head 1 --max-seq-len 32"
    pace = "--steps 4 --warmup-steps 1 --vocab-size 300 --batch-size 4"
    words = f"train --data fables:60 --name first --runs-dir {folder} {shape} {pace}"
    assert main(words.split()) == 0
    return folder / "first"


@contextlib.contextmanager
def command(*words):
    """`nanolm serve` as a program, from its first line on."""
    environment = unmeasured(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    program = [sys.executable, "-m", "nanolm", "serve", *map(str, words)]
    running = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield running, running.stderr.readline()
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def test_ctrl_c_in_the_middle_of_a_stream_ends_cleanly(run):
    with command(run, "--port", 0) as (running, line):
        url = re.search(r"first is at (http://127\.0\.0\.1:\d+) ", line)[1]
        assert exchange(url, path="/v1/models")[0] == 200
        with contextlib.closing(raw_stream(url, ENDLESS)) as client:
            running.send_signal(signal.SIGINT)
            last = b""
            while chunk := client.recv(1 << 16):
                last = (last + chunk)[-400:]
            assert b"[DONE]" in last
        assert running.wait(timeout=20) == 0
        assert running.stderr.read() == "stopped\n"


def test_open_and_other_addresses(run, capsys, monkeypatch):
    from nanolm.__main__ import main

    opened, served = [], []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("nanolm.serve.serve", lambda *args: served.append(args))
    assert main(["serve", str(run), "--port", "0", "--open"]) == 0
    said = capsys.readouterr().err
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", opened[0]) and opened[0] in said
    assert "careful" not in said and served[0][3]  # only for hosts of this machine
    assert main(["serve", str(run), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "there is no password" in capsys.readouterr().err
    assert served[1][3] == () and len(opened) == 1


def test_what_the_command_refuses(run, capsys, monkeypatch):
    from nanolm.__main__ import main

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "70000"]) == 2
    assert "0 to 65535" in capsys.readouterr().err
    assert main(["serve", str(run), "--port", "0", "--rows", "0"]) == 2
    assert main(["serve", "nobody", "--port", "0"]) == 2
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "nanolm.serve", None)
    monkeypatch.setattr("nanolm.__main__.newest_run", lambda: run)
    assert main(["serve"]) == 2
    assert "pip install 'nanolm[serve]'" in capsys.readouterr().err


# ---- the page in a browser


FINISHED = "return document.getElementById('stop').disabled && document.title == 'nanolm'"
SPANS = "return [...document.querySelectorAll('#text b')].map(e => e.textContent)"
GROUNDS = """return [...document.querySelectorAll('#text b')]
  .map(e => [e.style.getPropertyValue('--p'), getComputedStyle(e).backgroundColor])"""
CONTRAST = """
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b }
const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor
    if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255, 255, 255)' }
return [...document.querySelectorAll('h1, label, output, small, textarea, #status, #error, #text i,'
    + '#text b, #card td, .scale, button:enabled')].filter(e => e.textContent.trim()).map(e => {
  const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x)
  return [(a + .05) / (b + .05), (e.id || e.tagName) + ': ' + e.textContent.trim().slice(0, 20)]
}).filter(([ratio]) => ratio < 4.5)"""


class Visitor(Browser):
    """The browser of the book's pages, on the page of a server."""

    def __init__(self, url, tmp_path):
        super().__init__(tmp_path, tmp_path / "profile")
        self.base = url + "/"

    def css(self, selector):
        return self.driver.find_elements("css selector", selector)

    def set(self, name, value):
        self.driver.execute_script(
            "const e = document.querySelector(`[name=${arguments[0]}]`); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input'))",
            name,
            value,
        )

    def click(self, name, wait=True):
        self.css(f"#{name}")[0].click()
        if wait:
            assert soon(lambda: self.run(FINISHED))

    def text(self, name):
        return self.run(f"return document.getElementById('{name}').textContent")

    def mode(self, value):
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def visitor(url, tmp_path):
    found = Visitor(url, tmp_path)
    yield found
    found.close()


def visit(visitor, **settings):
    assert visitor.visit("", "return document.getElementById('model').textContent") == []
    for name, value in {"max_tokens": 24, "seed": 1, **settings}.items():
        visitor.set(name, value)


@needs_browser
def test_the_page_writes_what_the_library_writes(visitor, model):
    visitor.size(1100)
    visit(visitor, temperature=0.5)
    assert "tiny, a context of 64 tokens" in visitor.text("model")
    visitor.run("document.getElementById('prompt').value = 'ab'")
    visitor.click("write")
    config = SampleConfig(temperature=0.5, max_tokens=24, seed=1)
    got = generate_batch(model, BYTES, ["ab"], config)[0]
    assert visitor.text("text") == "ab" + got.text and visitor.text("error") == ""
    assert "".join(visitor.run(SPANS)) == got.text and "24 tokens" in visitor.text("status")
    grounds = visitor.run(GROUNDS)
    for (p, _), token in zip(grounds, got.tokens, strict=True):
        assert float(p) == pytest.approx(math.exp(token.logprob), abs=1e-3)
    assert len({colour for _, colour in grounds}) > 15  # each probability has its colour
    visitor.click("more")
    assert len(visitor.run(SPANS)) == 48 and "seed 1; cut off" in visitor.text("status")


@needs_browser
def test_the_card_shows_the_alternatives_and_what_was_cut(visitor):
    from selenium.webdriver.common.action_chains import ActionChains

    visitor.size(1100)
    visit(visitor, top_k=2, temperature=2)
    visitor.click("write")
    span = visitor.css("#text b")[3]
    ActionChains(visitor.driver).move_to_element(span).perform()
    rows = visitor.css("#card tr")
    assert len(rows) >= 9 and visitor.css("#card tr.drawn td")[0].text
    drawn = [row.text.split()[-1] for row in rows[1:]]
    assert sum(chance != "0" for chance in drawn) == 2 and visitor.css("#card tr.cut")
    ActionChains(visitor.driver).move_to_element(visitor.css("h1")[0]).perform()
    assert not visitor.css("#card tr")
    visitor.run("document.getElementById('text').focus()")
    for _ in range(2):
        ActionChains(visitor.driver).send_keys("\ue014").perform()  # the right arrow
    assert visitor.css("#text b.here")[0].get_attribute("data-i") == "1"


@needs_browser
def test_the_page_stops_and_says_what_is_wrong(visitor, url):
    visitor.size(1100)
    visit(visitor, temperature=0, max_tokens=512)
    visitor.run("document.getElementById('settings').max_tokens.max = 1e9")
    visitor.set("max_tokens", 10**8)
    visitor.click("write", wait=False)
    assert soon(lambda: len(visitor.run(SPANS)) > 20)
    assert health(url)["open"] == 1
    visitor.click("stop")
    assert "stopped" in visitor.text("status") and soon(lambda: health(url)["open"] == 0)
    visitor.run("document.getElementById('prompt').value = 'x'.repeat(99)")
    visitor.click("write")
    assert "1 to 64 tokens" in visitor.text("error")
    visitor.run("document.getElementById('prompt').value = '<img src=x onerror=alert(1)>'")
    visitor.set("max_tokens", 8)
    visitor.click("write")
    assert not visitor.css("#text img") and visitor.text("text").startswith("<img src=x")


@needs_browser
@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_page_is_readable(visitor, width, mode):
    from selenium.webdriver.common.action_chains import ActionChains

    visitor.size(width)
    visitor.mode(mode)
    visit(visitor, temperature=2, max_tokens=120)
    visitor.click("write")
    ActionChains(visitor.driver).move_to_element(visitor.css("#text b")[10]).perform()
    assert visitor.run("return document.documentElement.scrollWidth") <= width
    card = visitor.css("#card")[0].rect
    assert 0 <= card["x"] and card["x"] + card["width"] <= width
    paper = visitor.run("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", paper)[0]) < 60) == (mode == "dark")
    assert visitor.run(CONTRAST) == []
    if shots := os.environ.get("NANOLM_SHOTS"):
        visitor.driver.save_screenshot(f"{shots}/serve-{mode}-{width}.png")
