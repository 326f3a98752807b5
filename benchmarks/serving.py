"""The server under load: requests together beside one after another, and a soak.

    python -m benchmarks.serving [--rounds 5]
    python -m benchmarks.serving --soak 600

The model has 9.8 M parameters; prompts have 32 tokens, answers 64. The load comes from a process of
its own, over HTTP on a loopback address. The soak sends clients of all kinds, and holds each whole
answer to the text that the library gives for its seed, where no draw is a tie.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import time

from benchmarks.measure import peak_mb

SIZES = {"d_model": 256, "num_layers": 7, "num_heads": 4, "d_ff": 704, "context_length": 256}
NUM_PROMPT, NUM_NEW = 32, 64


def model_and_tokenizer():
    import torch

    from cs_lm.config.model import ModelConfig
    from cs_lm.models.transformer import TransformerLM
    from cs_lm.tokenizer import BPETokenizer

    generator = torch.Generator().manual_seed(0)
    model = TransformerLM(ModelConfig(vocab_size=8192, **SIZES), generator=generator).eval()
    # words of three letters: text that says which tokens it came from
    letters = "abcdefghijklmnopqrstu"
    words = [f" {a}{b}{c}".encode() for a in letters for b in letters for c in letters]
    vocab = {i: bytes([i]) for i in range(256)}
    vocab |= dict(enumerate(words[: 8192 - 257], start=256))
    return model, BPETokenizer(vocab, [], ["<|endoftext|>"])


def serve(port: int, started) -> None:
    import uvicorn

    from cs_lm.serving.app import Limits, build_app
    from cs_lm.serving.engine import Engine

    engine = Engine(*model_and_tokenizer(), max_rows=16, max_queue=64)
    app = build_app({"model": engine}, Limits(request_s=60))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", access_log=False))
    started.set()
    server.run()


@contextlib.contextmanager
def running():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=serve, args=(port, started))
    process.start()
    started.wait()
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    try:
        yield port, process
    finally:
        process.terminate()
        process.join()


def body_of(number: int, stream: bool = True, **more) -> dict:
    rng = random.Random(number)
    ids = [rng.randrange(256, 8000) for _ in range(NUM_PROMPT)]
    return {"model": "model", "prompt": ids, "max_tokens": NUM_NEW, "temperature": 1.0,
            "seed": number, "stream": stream, **more}  # fmt: skip


async def send(port: int, body: bytes | dict):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def streamed(port: int, number: int) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    start = time.perf_counter()
    reader, writer = await send(port, body_of(number))
    first = None
    while line := await reader.readline():
        if first is None and line.startswith(b"data: {"):
            first = time.perf_counter() - start
    writer.close()
    return first, time.perf_counter() - start


async def compare(port: int, rounds: int, count: int = 8) -> None:
    await streamed(port, 0)
    ratios, later = [], []
    for turn in range(rounds):
        numbers = [100 * turn + i for i in range(count)]
        start = time.perf_counter()
        alone = [await streamed(port, number) for number in numbers]
        one_by_one_s = time.perf_counter() - start
        start = time.perf_counter()
        together = await asyncio.gather(*(streamed(port, number) for number in numbers))
        together_s = time.perf_counter() - start
        ratios.append(one_by_one_s / together_s)
        first_alone = statistics.median(first for first, _ in alone)
        first_together = statistics.median(first for first, _ in together)
        later.append(first_together / first_alone)
        tokens = count * NUM_NEW
        print(json.dumps({
            "question": f"{count} clients", "tokens_per_s_one_by_one": round(tokens / one_by_one_s),
            "tokens_per_s_together": round(tokens / together_s),
            "first_token_alone_ms": round(1000 * first_alone),
            "first_token_together_ms": round(1000 * first_together),
        }), flush=True)  # fmt: skip
    print(json.dumps({
        "question": f"{count} clients", "throughput_ratio": round(statistics.median(ratios), 2),
        "first_token_ratio": round(statistics.median(later), 2), "rounds": rounds,
    }))  # fmt: skip


async def soak(port: int, process, seconds: float, clients: int = 16) -> None:
    counts: collections.Counter[str] = collections.Counter()
    pool = {number: expected_of(number) for number in range(32)}
    pool = {number: text for number, text in pool.items() if text is not None}
    end = time.monotonic() + seconds
    memory = []

    async def client(index: int) -> None:
        rng = random.Random(index)
        while time.monotonic() < end:
            kind = rng.choice(["stream", "whole", "cutter", "slow", "garbage", "limits"])
            try:
                await asyncio.wait_for(KINDS[kind](port, rng, pool, counts), 60)
            except (OSError, asyncio.IncompleteReadError) as error:
                counts[f"{kind}: {type(error).__name__}"] += 1
            counts[kind] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
                memory.append(int(file.read().split()[1]) * 4096 / 2**20)
            await asyncio.sleep(max(1.0, seconds / 20))

    await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    await asyncio.sleep(2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    health = json.loads((await reader.read()).rsplit(b"\r\n\r\n", 1)[1])
    half = len(memory) // 2
    print(json.dumps({"question": f"soak of {seconds:.0f} s, {clients} clients", **counts,
                      "wrong_texts": counts["wrong"], "health": health,
                      "server_mb_first_half": round(max(memory[:half])),
                      "server_mb_second_half": round(max(memory[half:])),
                      "client_mb": round(peak_mb())}))  # fmt: skip


def expected_of(number: int) -> str | None:
    """The library's text for a request, or None if one of its draws is a tie.

    Rows in other company are rounded differently. A draw that falls within 2e-7 of the border
    between two tokens may then take the other one.
    """
    import torch

    from cs_lm.inference.decoding_config import DecodingConfig
    from cs_lm.inference.generate import generate_tokens
    from cs_lm.inference.sampling import uniform_draws
    from cs_lm.inference.text import allowed_ids, stop_ids_of
    from cs_lm.ops.reference import softmax

    if not _LIBRARY:
        _LIBRARY.extend(model_and_tokenizer())
    model, tokenizer = _LIBRARY
    stop_ids = stop_ids_of(tokenizer, ())
    allowed = allowed_ids(tokenizer, 8192, None, stop_ids)
    config = DecodingConfig(max_new_tokens=NUM_NEW, temperature=1.0, seed=number)
    (uniform,) = uniform_draws(number, [0], NUM_NEW)
    prompt, finished, ids = body_of(number)["prompt"], [False], []
    steps = generate_tokens(model, [prompt], config, finished, stop_ids, allowed)
    for draw, step in zip(uniform, steps):
        borders = softmax(step.logits[0].masked_fill(~allowed, -torch.inf)).double().cumsum(0)
        if (borders - draw * borders[-1]).abs().min() < 2e-7:
            return None
        ids += [i for i in step.token_ids if i is not None]
    return tokenizer.decode(ids)


_LIBRARY: list = []


async def _stream(port, rng, pool, counts, pause_s: float = 0.0) -> None:
    number = rng.choice(list(pool))
    reader, writer = await send(port, body_of(number))
    status = (await reader.readline()).split()[1]
    text, done = "", False
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            record = json.loads(line[6:])
            text += "".join(choice["text"] for choice in record.get("choices", ()))
        done = done or line.startswith(b"data: [DONE]")
        await asyncio.sleep(pause_s)
    writer.close()
    _judge(status, text, pool[number], done, counts)


async def _slow(port, rng, pool, counts) -> None:
    await _stream(port, rng, pool, counts, pause_s=0.02)


async def _whole(port, rng, pool, counts) -> None:
    number = rng.choice(list(pool))
    reader, writer = await send(port, body_of(number, stream=False))
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split()[1]
    text = json.loads(body)["choices"][0]["text"] if status == b"200" else ""
    _judge(status, text, pool[number], True, counts)


def _judge(status: bytes, text: str, expected: str, done: bool, counts) -> None:
    if status == b"429":
        counts["refused, 429"] += 1
    elif status != b"200" or not done:
        counts["broken"] += 1
    else:
        counts["right" if text == expected else "wrong"] += 1


async def _cutter(port, rng, pool, counts) -> None:
    _, writer = await send(port, body_of(rng.randrange(1000), stream=rng.random() < 0.5))
    await asyncio.sleep(rng.random() * 0.3)
    writer.transport.abort()


async def _garbage(port, rng, pool, counts) -> None:
    data = rng.choice([b"{", b"\xff" * 50, b"[" * 50_000, b"{}", b'{"model":"../x"}'])
    reader, writer = await send(port, data)
    counts["garbage answered 4xx"] += (await reader.readline()).split()[1].startswith(b"4")
    writer.close()


async def _limits(port, rng, pool, counts) -> None:
    body = body_of(1, **rng.choice([{"max_tokens": 9999}, {"n": 99}, {"temperature": -1}]))
    reader, writer = await send(port, body)
    counts["limits answered 400"] += (await reader.readline()).split()[1] == b"400"
    writer.close()


KINDS = {"stream": _stream, "slow": _slow, "whole": _whole, "cutter": _cutter,
         "garbage": _garbage, "limits": _limits}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    chosen = parser.parse_args(argv)
    with running() as (port, process):
        if chosen.soak:
            asyncio.run(soak(port, process, chosen.soak))
        else:
            asyncio.run(compare(port, chosen.rounds))


if __name__ == "__main__":
    main()
