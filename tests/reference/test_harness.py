"""EleutherAI's harness on a local task, beside our own numbers for the same task."""

import json

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.evaluation.in_context import InContextOptions, accuracy, answer_all, pose
from cs_lm.evaluation.prompts import PromptFormat
from cs_lm.evaluation.scoring import score_tokens
from cs_lm.evaluation.tasks import read_examples
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.text import generate_text
from cs_lm.models.transformer import TransformerLM
from cs_lm.tokenizer import BPETokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(16, 2, 24, 257, 2, 160)
    model = TransformerLM(config, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.lm_head.weight *= 6
    return model


def test_ours_and_the_harness_agree(model, tmp_path, monkeypatch):
    """The accuracy, and the log-probability of each choice of each question."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from cs_lm.evaluation.lm_eval_model import HarnessModel

    rows = [
        {"question": f"Is {i} even?", "choices": ["yes", "no", "who knows"], "answer": i % 3}
        for i in range(40)
    ]
    path = tmp_path / "even.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(
        model=HarnessModel(model, BYTES),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    examples = read_examples([str(path)])
    options = InContextOptions("multiple_choice", PromptFormat())
    questions = pose(BYTES, model.config.context_length, examples, [], 0, options)
    answered = answer_all(model, BYTES, questions, options)
    assert found["results"]["even"]["acc,none"] == pytest.approx(accuracy(answered).share)
    for sample, one in zip(found["samples"]["even"], answered, strict=True):
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        assert scores == pytest.approx(one.scores, abs=1e-3)


def test_the_three_questions_of_the_interface(model):
    from lm_eval.api.instance import Instance

    from cs_lm.evaluation.lm_eval_model import HarnessModel

    ours = HarnessModel(model, BYTES)

    def asked(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    text = "A text that is longer than the context of the model. " * 5
    (total,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", text))
    scores = score_tokens(model, [256, *BYTES.encode(text)])
    assert total == pytest.approx(-sum(score.nats or 0 for score in scores), rel=1e-5)
    ((empty, _),) = ours.loglikelihood(asked("loglikelihood", "", "abc"))
    alone = score_tokens(model, [256, 97, 98, 99])
    assert empty == pytest.approx(-sum(score.nats or 0 for score in alone), rel=1e-5)
    settings = {"until": ["e"], "max_gen_toks": 12}
    (text,) = ours.generate_until(asked("generate_until", "abc", settings))
    config = DecodingConfig(max_new_tokens=12, temperature=0.0, stop=("e",))
    assert text == generate_text(model, BYTES, ["abc"], config)[0]
