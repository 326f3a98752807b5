"""The server: OpenAI's endpoints, limits, clients that go away, and the end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from cs_lm.cli.commands import main as command
from cs_lm.cli.serve import LOOPBACK
from cs_lm.config.model import ModelConfig
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.text import complete
from cs_lm.models.transformer import TransformerLM
from cs_lm.serving.app import Limits, build_app
from cs_lm.serving.chat import chat_prompt, chat_template
from cs_lm.serving.engine import Engine
from cs_lm.tokenizer import BPETokenizer

BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONTEXT = 200


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(12, 3, 20, 258, 2, CONTEXT)
    model = TransformerLM(config, generator=torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 6
        model.lm_head.weight[128:] *= 0.01  # text, not half characters
    return model


@contextlib.contextmanager
def served(model, limits=None, **settings):
    """A server in a thread; gives its address and its engine."""
    import uvicorn

    rest = {key: settings.pop(key) for key in ("api_key", "hosts") if key in settings}
    engine = Engine(model, BYTES, **settings)
    app = build_app({"tiny": engine}, limits or Limits(), **rest)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model):
    with served(model, hosts=LOOPBACK, max_rows=8) as (address, _):
        yield address


def ask(address, path, body=None, headers=None, raw=None):
    """Status and JSON of the answer."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(address + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def stream_of(address, path, body):
    request = urllib.request.Request(
        address + path, json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.read().decode("utf-8").split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def library(model, prompts, **settings):
    return complete(model, BYTES, prompts, DecodingConfig(**{"temperature": 1.0, **settings}))


def test_models_page_and_health(server):
    status, found = ask(server, "/v1/models")
    assert status == 200 and [one["id"] for one in found["data"]] == ["tiny"]
    assert ask(server, "/v1/models/tiny")[1]["context_length"] == CONTEXT
    assert ask(server, "/v1/models/none")[0] == 404
    assert ask(server, "/health")[1]["status"] == "ok"
    with urllib.request.urlopen(server) as answer:
        page, policy = answer.read().decode("utf-8"), answer.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy).group(1)
    assert f'<script nonce="{nonce}">' in page and "<option>tiny</option>" in page
    assert "default-src 'none'" in policy and "http://" not in page


def test_completions_are_those_of_the_library(server, model):
    body = {"model": "tiny", "prompt": ["ab", "xyz"], "max_tokens": 12, "n": 2, "seed": 5}
    status, found = ask(server, "/v1/completions", body)
    wanted = library(model, ["ab", "xyz"], max_new_tokens=12, num_samples=2, seed=5)
    assert status == 200 and found["object"] == "text_completion"
    assert [choice["text"] for choice in found["choices"]] == [one.text for one in wanted]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    num_tokens = sum(len(one.sample.token_ids) for one in wanted)
    assert found["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": num_tokens,
        "total_tokens": 5 + num_tokens,
    }
    chunks = stream_of(server, "/v1/completions", body)
    texts = [""] * 4
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [one.text for one in wanted]
    ids = body | {"prompt": BYTES.encode("ab"), "n": 1}
    assert ask(server, "/v1/completions", ids)[1]["choices"][0]["text"] == wanted[0].text


def test_filters_stops_and_logprobs(server, model):
    settings = {"top_p": 0.9, "frequency_penalty": 0.4, "seed": 9}
    free = library(model, ["ab"], max_new_tokens=40, **settings)[0].text
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 40, **settings}
    choice = ask(server, "/v1/completions", body | {"stop": free[5:7]})[1]["choices"][0]
    assert choice["text"] == free[: free.index(free[5:7])] and choice["finish_reason"] == "stop"
    choice = ask(server, "/v1/completions", body | {"logprobs": 3})[1]["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == free
    assert all(len(top) == 3 for top in found["top_logprobs"])
    places = [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]
    assert found["text_offset"] == places
    greedy = body | {"temperature": 0, "max_tokens": 5}
    text = ask(server, "/v1/completions", greedy)[1]["choices"][0]["text"]
    wanted = {"temperature": 0.0, "frequency_penalty": 0.4, "max_new_tokens": 5}
    assert text == library(model, ["ab"], **wanted)[0].text


def test_chat(server, model):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi <|endoftext|>"}]}]
    body = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "seed": 3,
            "logprobs": True, "top_logprobs": 2}  # fmt: skip
    status, found = ask(server, "/v1/chat/completions", body)
    prompt = chat_prompt(BYTES, [("user", "Hi <|endoftext|>")])
    assert BYTES.decode(prompt.token_ids) == "User: Hi <|endoftext|>\nAssistant:"
    assert 256 not in prompt.token_ids, "a control token that a client types stays text"
    choice = found["choices"][0]
    assert status == 200 and found["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert found["usage"]["prompt_tokens"] == len(prompt.token_ids)
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    body["stream_options"] = {"include_usage": True}
    chunks = stream_of(server, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == choice["message"]["content"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == found["usage"]


def test_a_chat_with_special_tokens():
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [], names)
    messages = [("system", "s"), ("user", "<|end|>")]
    prompt = chat_prompt(tokenizer, messages, chat_template(tokenizer))
    assert prompt.stop == ()
    text = [tokenizer.vocab[i].decode() for i in prompt.token_ids]
    assert text == ["<|user|>", "s", "<|end|>", "<|user|>", *"<|end|>", "<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "model: got 'other', need one of tiny"),
        ({"model": "../tiny"}, 404, "model: got '../tiny', need one of tiny"),
        ({"seed": 10**400}, 400, "seed: got a number of more than 19 digits, need"),
        ({"temperature": 10**400}, 400, "temperature: got a number of more than 19 digits"),
        ({"max_tokens": 10**400}, 400, "max_tokens: got a number of more than 19 digits"),
        ({"prompt": ""}, 400, "prompt: is empty"),
        ({"prompt": None}, 400, "prompt: need text, or token ids from 0 to 257"),
        ({"prompt": [1, 258]}, 400, "prompt: need text, or token ids"),
        ({"prompt": "\ud800"}, 400, "prompt: has half of a surrogate pair"),
        ({"prompt": ["a"] * 17}, 400, "prompt: got 17, need at most 16"),
        ({"max_tokens": 0}, 400, "max_tokens: got 0, need 1 or more"),
        ({"max_tokens": 500}, 400, "this model's context is 200 tokens; the prompt has 2"),
        ({"temperature": "hot"}, 400, "temperature: got 'hot', need a number"),
        ({"temperature": True}, 400, "temperature: got True, need a number"),
        ({"top_p": 1.5}, 400, "top_p: got 1.5, need above 0, at most 1.0"),
        ({"seed": 1.5}, 400, "seed: got 1.5, need a whole number"),
        ({"top_p": 0}, 400, "top_p: got 0, need above 0, at most 1.0"),
        ({"n": 9}, 400, "n: 1 prompts with 9 answers each are 9 answers, need at most 8 in one"),
        ({"model": None}, 400, "model: is missing, need one of tiny"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: needs stream: true"),
        ({"stop": ["a"] * 5}, 400, "stop: got 5 texts, need at most 4"),
        ({"stop": 3}, 400, "stop: need a text"),
        ({"stream": "yes"}, 400, "stream: got 'yes', need true or false"),
        ({"logprobs": 50}, 400, "logprobs: got 50, need 0 to 20"),
        ({"echo": True}, 400, "echo: is not supported"),
        ({"warmth": 1}, 400, "warmth: unknown field"),
        ({"best_of": 3}, 400, "best_of: is not supported, except equal to n"),
    ],
)
def test_a_bad_request_is_one_clear_error(server, change, status, message):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2} | change
    found, answer = ask(server, "/v1/completions", body)
    assert found == status and answer["error"]["message"].startswith(message), answer
    assert answer["error"]["param"] in change
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_garbage(server):
    for raw, status in [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"model": NaN}', 404),
        (b"{}", 400),
        (b" " * ((1 << 20) + 1), 413),
    ]:
        assert ask(server, "/v1/completions", raw=raw)[0] == status
    plain = {"Content-Type": "text/plain"}
    assert ask(server, "/v1/completions", raw=b"{}", headers=plain)[0] == 415
    assert ask(server, "/v1/completions")[0] == 405 and ask(server, "/../etc/passwd")[0] == 404
    assert ask(server, "/v1/models", headers={"Host": "evil.example"})[0] == 403
    chat = {"model": "tiny", "messages": [{"role": "pirate", "content": "a"}]}
    for messages in (chat["messages"], [], "a", [{"role": "user", "content": 3}]):
        assert ask(server, "/v1/chat/completions", chat | {"messages": messages})[0] == 400
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"\x16\x03\x01garbage\r\n\r\n")
        assert b"400" in raw.recv(100)
    assert ask(server, "/health")[0] == 200


def test_the_key_is_asked_for(model):
    with served(model, api_key="secret") as (address, _):
        assert ask(address, "/v1/models")[0] == 401
        assert ask(address, "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(address, "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert ask(address, "/health")[0] == 200


def wait_until_idle(engine):
    """The last event of an answer is sent before its row is removed."""
    deadline = time.monotonic() + 10
    while engine.num_active or engine.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_limits_have_a_clear_status(model):
    limits = Limits(body_bytes=200, body_s=0.3, request_s=0.05)
    with served(model, limits, max_rows=1, max_queue=1) as (address, engine):
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 150, "seed": 1}
        assert ask(address, "/v1/completions", body | {"prompt": "a" * 300})[0] == 413
        status, answer = ask(address, "/v1/completions", body)
        assert status == 504 and "took longer than 0.05 s" in answer["error"]["message"]
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
            slow.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            assert b"408" in slow.recv(100)
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(ask(address, "/v1/completions", body)[0]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 429 in found and set(found) <= {429, 504}
        wait_until_idle(engine)


def test_a_client_that_goes_away_frees_its_row(model):
    with served(model, max_rows=1) as (address, engine):
        port = int(address.rsplit(":", 1)[1])
        for stream in (True, False):
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 190, "stream": stream, "seed": 1}
            data = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", port)) as client:
                head = (
                    f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
                )
                client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
                while engine.num_active == 0:
                    time.sleep(0.001)
            wait_until_idle(engine)


def test_the_real_client(server, model):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="any")
    assert [one.id for one in client.models.list()] == ["tiny"]
    stream = client.completions.create(
        model="tiny", prompt="ab", max_tokens=20, seed=4, stream=True
    )
    wanted = library(model, ["ab"], max_new_tokens=20, seed=4)[0].text
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted
    messages = [{"role": "user", "content": "Hi"}]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, seed=4, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    whole = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, seed=4, logprobs=True
    )
    assert text == whole.choices[0].message.content
    assert last.usage == whole.usage and len(whole.choices[0].logprobs.content) > 0
    with pytest.raises(openai.BadRequestError, match="temperature: got 9"):
        client.completions.create(model="tiny", prompt="ab", temperature=9)
    with pytest.raises(openai.NotFoundError, match="model: got 'none'"):
        client.completions.create(model="none", prompt="ab")


def started(folder, *python, flags=()):
    """A server in a process of its own, and its address."""
    argv = [sys.executable, *python, "serve", "--out_dir", "runs/animals", "--port", "0", *flags]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    return process, process.stdout.readline().split("/  ")[0]


SLOW = """
import sys, time
from cs_lm.cli.commands import main
from cs_lm.serving.engine import Engine

decode = Engine._decode
Engine._decode = lambda self: (time.sleep(0.5), decode(self))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_requests_that_do_not_end_in_time_get_an_error(finished_run):
    process, address = started(finished_run, "-c", SLOW, flags=["--drain_timeout_s", "1"])
    body = {"model": "animals", "prompt": "T", "max_tokens": 30, "seed": 1}
    found, streamed = [], []

    def stream():
        data = json.dumps(body | {"stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            streamed.append(answer.read().decode())

    threads = [
        threading.Thread(target=lambda: found.append(ask(address, "/v1/completions", body))),
        threading.Thread(target=stream),
    ]
    for thread in threads:
        thread.start()
    while ask(address, "/health")[1]["active"] < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    for thread in threads:
        thread.join(20)
    assert found[0][0] == 503 and found[0][1]["error"]["message"] == "the server stops"
    assert "the server stops" in streamed[0].strip().splitlines()[-1]
    errors = process.stderr.read()
    assert "Traceback" not in errors and "2 requests end with an error" in errors
    process.stdout.close()
    process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_signal_lets_requests_end(finished_run):
    process, address = started(finished_run, "-m", "cs_lm")
    body = {"model": "animals", "prompt": "T", "max_tokens": 30, "seed": 1, "n": 8}
    whole = ask(address, "/v1/completions", body)[1]["choices"]
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(address, "/v1/completions", body)))
    thread.start()
    while ask(address, "/health")[1]["active"] == 0 and not found:
        pass
    process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert found[0][1]["choices"] == whole
    assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host: got '0.0.0.0', which other machines may reach, need an"),
        (["--port", "70000"], "--port: got 70000, need 0 to 65535"),
        (["--max_rows", "0"], "--max_rows: got 0, need 1 or more"),
        (["--api_key", ""], "--api_key: is empty"),
    ],
)
def test_what_cannot_be_served(finished_run, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(finished_run)
    monkeypatch.delenv("CS_LM_API_KEY", raising=False)
    assert command(["serve", "--out_dir", "runs/animals", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(finished_run, monkeypatch, capsys):
    monkeypatch.chdir(finished_run)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert command(["serve", "--out_dir", "runs/animals", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
