"""Continuous batching: each answer is the one that the library gives for its seed."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate_samples
from cs_lm.inference.text import allowed_ids, complete, stop_ids_of
from cs_lm.models.registry import build_model
from cs_lm.serving.engine import Engine, EngineStoppedError, Event, Job, QueueFullError
from cs_lm.serving.responses import Answers
from cs_lm.tokenizer import BPETokenizer

BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONTEXT = 40


@pytest.fixture(scope="module", params=[ModelConfig, GPT2Config])
def model(request):
    config = request.param(12, 3, 20, 258, 2, CONTEXT)
    model = build_model(config, generator=torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        model.output_embedding.mul_(6)
    return model


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """Fills `torch.empty` with NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Client:
    """Collects the events of one job."""

    def __init__(self, engine, prompts, **settings):
        self.events, self.done = [], threading.Event()
        self.config = DecodingConfig(**{"max_new_tokens": 9, **settings})
        self.prompts = [BYTES.encode(prompt) for prompt in prompts]
        self.job = Job(self.prompts, self.config, self._emit)
        self._open = self.job.num_rows
        engine.submit(self.job)

    def _emit(self, events):
        self.events += events
        self._open -= sum(event.finish_reason is not None for event in events)
        if self._open == 0 or any(event.finish_reason == "error" for event in events):
            self.done.set()

    def answers(self):
        assert self.done.wait(20)
        texts, reasons = {}, {}
        for event in self.events:
            texts[event.answer] = texts.get(event.answer, "") + event.text
            reasons[event.answer] = event.finish_reason or reasons.get(event.answer)
        return [(texts[i], reasons[i]) for i in range(self.job.num_rows)]


@pytest.fixture
def engine(model):
    engine = Engine(model, BYTES, max_rows=5, max_queue=50)
    engine.start()
    yield engine
    engine.stop()


SETTINGS = [
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 4, "top_k": 5, "num_samples": 3},
    {"seed": 5, "top_p": 0.8, "max_new_tokens": 30},
    {"seed": 6, "repetition_penalty": 1.4, "presence_penalty": 0.5, "max_new_tokens": 25},
    {"seed": 7, "no_repeat_ngram": 2, "num_samples": 2, "max_new_tokens": 20},
    {"seed": 8, "min_p": 0.02, "frequency_penalty": 0.3, "max_new_tokens": 3},
    {"seed": 9, "stop": ("e", "a"), "max_new_tokens": 30},
]


def expected(model, prompts, config):
    found = complete(model, BYTES, prompts, config)
    return [(one.text, one.finish_reason) for one in found]


def test_answers_are_those_of_the_library(model, engine):
    """Sixty requests of eight kinds, sent while others are decoded."""
    clients = []
    for number in range(60):
        settings = SETTINGS[number % len(SETTINGS)]
        prompts = ["A prompt"[: 1 + number % 8]] * (1 + number % 2)
        while True:
            try:
                clients.append((Client(engine, prompts, **settings), prompts))
                break
            except QueueFullError:
                time.sleep(0.01)
        time.sleep(0.002 * (number % 3))
    for client, prompts in clients:
        assert client.answers() == expected(model, prompts, client.config)


def test_logprobs_are_those_of_the_library(model, engine):
    client = Client(engine, ["ab"], seed=2, num_alternatives=3, max_new_tokens=5)
    client.answers()
    allowed = allowed_ids(BYTES, 258, None, frozenset([256]))
    (sample,) = generate_samples(model, client.prompts, client.config, frozenset([256]), allowed)
    events = [event for event in client.events if event.token_id is not None]
    assert [event.token_id for event in events] == sample.token_ids
    assert [event.logprob for event in events] == pytest.approx(sample.logprobs, abs=1e-4)
    assert [[i for i, _ in e.alternatives] for e in events] == [
        [i for i, _ in others] for others in sample.alternatives
    ]


def test_long_and_short_answers_share_the_cache(model, engine):
    """Rows come and go at different columns; the cache is compacted on the way."""
    long = [Client(engine, ["x" * n], seed=n, max_new_tokens=CONTEXT - n) for n in (1, 20, 35)]
    short = []
    for number in range(40):
        short.append(Client(engine, ["yz" * (1 + number % 9)], seed=number, max_new_tokens=2))
        short[-1].answers()
    for client in long + short:
        prompts = [BYTES.decode(ids) for ids in client.prompts]
        assert client.answers() == expected(model, prompts, client.config)


def test_a_cancelled_request_frees_its_rows(model, engine):
    client = Client(engine, ["a"], temperature=0.0, max_new_tokens=CONTEXT - 1)
    client.job.cancelled = True
    deadline = time.monotonic() + 10
    while engine.num_active or engine.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    later = Client(engine, ["b"], temperature=0.0)
    assert later.answers() == expected(model, ["b"], later.config)


def test_a_deadline_ends_a_request_with_an_error(model):
    engine = Engine(model, BYTES)
    events = []
    done = threading.Event()

    def emit(new):
        events.extend(new)
        if new[-1].finish_reason:
            done.set()

    config = DecodingConfig(max_new_tokens=30)
    engine.submit(Job([[97]], config, emit, timeout_s=-1.0))
    engine.start()
    assert done.wait(10) and events[-1].finish_reason == "error"
    assert "took longer" in events[-1].text
    engine.stop()


def test_waiting_requests_leave_when_late_or_cancelled(model):
    """Behind a request for which there is no room."""
    engine, seen = Engine(model, BYTES, max_rows=1), []
    large = Job([[97], [98]], DecodingConfig(), seen.extend)
    late = Job([[97]], DecodingConfig(), seen.extend, timeout_s=-1.0)
    cancelled = Job([[97]], DecodingConfig(), seen.extend, cancelled=True)
    for job in (large, late, cancelled):
        engine.submit(job)
    assert engine._next_jobs() == [] and list(engine._waiting) == [large]
    assert [event.finish_reason for event in seen] == ["error"]


def test_a_full_queue_and_a_stopped_engine_refuse(model):
    """A job for which rows are free does not count as waiting."""
    engine = Engine(model, BYTES, max_rows=3, max_queue=2)
    seen = []
    for _ in range(5):
        engine.submit(Job([[97]], DecodingConfig(), seen.extend))
    with pytest.raises(QueueFullError):
        engine.submit(Job([[97]], DecodingConfig(), seen.extend))
    engine._stopped = True
    engine.start()
    engine.stop()
    assert [event.status for event in seen] == [503] * 5
    with pytest.raises(EngineStoppedError):
        engine.submit(Job([[97]], DecodingConfig(), seen.extend))


def test_a_failure_ends_its_requests_and_not_the_engine(model, engine, monkeypatch, caplog):
    monkeypatch.setattr(
        "cs_lm.serving.engine.sample_tokens", lambda *_: (_ for _ in ()).throw(RuntimeError("x"))
    )
    client = Client(engine, ["a"])
    assert client.done.wait(10) and client.events[-1].finish_reason == "error"
    monkeypatch.undo()
    later = Client(engine, ["a"])
    assert later.answers() == expected(model, ["a"], later.config)


def test_chat_answers_end_at_their_end_token():
    """Whether or not the tokenizer names it among those that end a text."""
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [], names)
    (end,) = tokenizer.encode("<|end|>")
    config = ModelConfig(12, 3, 20, 259, 1, CONTEXT)
    model = build_model(config, generator=torch.Generator().manual_seed(1)).eval()
    assert end not in stop_ids_of(tokenizer, ())
    assert end in Engine(model, tokenizer)._stop_ids
    assert Engine(model, BYTES)._stop_ids == {256}


def test_a_stream_has_one_token_in_a_chunk():
    """So that the text of each chunk is that of its token, also for a slow reader."""
    asked = SimpleNamespace(
        is_chat=False, model="m", prompts=[[1]], config=DecodingConfig(num_alternatives=1)
    )
    answers = Answers(asked, BYTES.vocab)
    events = [
        Event(0, "n", 110, -0.1, [(110, -0.1)]),
        Event(0, "", 195, -0.2, [(195, -0.2)]),
        Event(0, "\u00e9", 169, -0.3, [(169, -0.3)]),
        Event(0, "!", None, finish_reason="stop"),
    ]
    parts = answers.chunks(events).decode("utf-8").split("\n\n")[:-1]
    choices = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
    assert [choice["text"] for choice in choices] == ["n", "", "\u00e9", "!"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [1, 1, 1, 0]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0], [1], [1], []]
    assert (
        choices[-1]["finish_reason"] == "stop"
        and answers.whole()["choices"][0]["text"] == "n\u00e9!"
    )
