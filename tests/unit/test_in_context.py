"""Tasks from files, prompts, scored answers, intervals and contamination."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.evaluation.contamination import contaminated
from cs_lm.evaluation.in_context import (
    InContextOptions,
    accuracy,
    accuracy_by_subject,
    mean_logprob,
    pose,
)
from cs_lm.evaluation.in_context import (
    answer_all as answer_posed,
)
from cs_lm.evaluation.intervals import bootstrap_interval, wilson_interval
from cs_lm.evaluation.likelihood import likelihoods, token_pair
from cs_lm.evaluation.prompts import PromptFormat, build_prompt, demonstrations_for
from cs_lm.evaluation.tasks import Example, kind_of, last_number, normalised, read_examples
from cs_lm.inference.sampling import NotANumberError
from cs_lm.models.transformer import TransformerLM
from cs_lm.tokenizer import BPETokenizer

BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [], ["<|end|>"])
CORPORA = os.environ.get("CS_LM_CORPORA")


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(12, 3, 20, 257, 2, 96)
    model = TransformerLM(config, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.lm_head.weight *= 6
    return model


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_files_that_people_have(tmp_path):
    lines = [
        {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
        {"prompt": "2+2?", "choices": ["3", "4"], "label": "B", "subject": "sums"},
        {"context": "2+2?", "choices": {"text": ["3", "4"]}, "answer": "4"},
    ]
    path = written(tmp_path, "maths_test.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    found = read_examples([path])
    assert [one.answer for one in found] == ["4", "4", "4"]
    assert [one.subject for one in found] == ["maths", "sums", "maths"]
    assert found[0].id == found[2].id and kind_of(found) == "multiple_choice"
    mmlu = written(tmp_path, "a_b_dev.csv", '"Which, one?",x,"y, z",v,w,B\nTwo?,1,2,3,4,D\n')
    assert read_examples([mmlu]) == [
        Example("Which, one?", "y, z", ("x", "y, z", "v", "w"), "a_b"),
        Example("Two?", "4", ("1", "2", "3", "4"), "a_b"),
    ]
    heads = written(tmp_path, "c.csv", "Question,A,B,Answer\nq,x,y,B\n")
    assert read_examples([heads]) == [Example("q", "y", ("x", "y"), "c")]
    free = written(tmp_path, "free.csv", "prompt,target\nCapital of France?,Paris\n")
    assert kind_of(read_examples([free])) == "exact_match"
    assert len(read_examples([str(tmp_path / "*.csv")])) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "[1]", r"a.jsonl, line 1: got '\[1\]', need a JSON object"),
        ("a.jsonl", '\n{"question": ', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", '{"question": "q"}', "line 1: has none of answer, target, label"),
        ("a.jsonl", '{"question": "q", "answer": "E", "choices": ["x", "y"]}', "got answer 'E', n"),
        ("a.jsonl", '{"question": "q", "answer": 2, "choices": ["x", "y"]}', "got answer 2, need"),
        ("a.jsonl", '{"question": "q", "answer": "x", "choices": "xy"}', "got choices 'xy', need"),
        ("a.csv", "q,x\n", "a.csv, line 1: got 2 columns, the last one 'x', need a first line"),
        ("a.csv", "q,x,y,C\n", "a.csv, line 1: got 4 columns, the last one 'C'"),
        ("a.csv", "question,A,B,answer\n\nq,x\n", "a.csv, line 3: got 2 columns, need 4"),
        ("a.jsonl", '{"question": "q", "answer": "x", "choices": ["x", " "]}', "choice 2 is empty"),
        ("a.csv", "question,A,B,answer\nq,x,y,A,more\n", "a.csv, line 2: got 5 columns, need 4"),
        ("a.csv", "Query,Gold\nq,x\n", "a first line with names of columns .one of question, pro"),
        ("a.jsonl", '{"question": " ", "answer": "x"}', "a.jsonl, line 1: the question is empty"),
        ("a.jsonl", '{"question": "q", "answer": ""}', "a.jsonl, line 1: the answer is empty"),
        ("a.jsonl", "", "--task_path: .*a.jsonl' holds no example; leave it out"),
    ],
)
def test_files_that_are_not_understood(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_examples([written(tmp_path, name, text)])
    with pytest.raises(ValueError, match="--task_path: got 'none', which is not a file, nor"):
        read_examples(["none"])


@pytest.mark.skipif(CORPORA is None, reason="CS_LM_CORPORA names no folder of real texts")
def test_mmlu_and_gsm8k_are_read_as_they_are():
    tasks = Path(CORPORA) / "tasks"
    mmlu = read_examples([str(tasks / "mmlu" / "*_val.csv")])
    assert {len(one.choices) for one in mmlu} == {4} and len({one.subject for one in mmlu}) == 8
    assert all(one.answer in one.choices for one in mmlu)
    gsm8k = read_examples([str(tasks / "gsm8k-test.jsonl")])
    assert kind_of(gsm8k) == "last_number" and last_number(gsm8k[0].answer) == "18"
    assert all(last_number(one.answer) is not None for one in gsm8k)


def test_numbers_and_words_are_compared_as_people_do():
    for text, number in [
        ("so 1,234 in all.", "1234"),
        ("#### -5", "-5"),
        ("2.50 dollars", "2.5"),
        ("7.00", "7"),
        ("from 3 to .5", "0.5"),
        ("none", None),
        ("100", "100"),
        ("10-20", "20"),
        ("-0", "0"),
        ("1,500,000.0", "1500000"),
    ]:
        assert last_number(text) == number
    assert normalised("  The  CAT. ") == normalised("the cat")


def test_prompts():
    capital = Example("Capital of France?", "Paris", ("Rome", "Paris"))
    shown = PromptFormat(instruction="Answer.")
    assert shown.solved(capital) == "Question: Capital of France?\nAnswer: Paris"
    assert shown.context(capital) + shown.answer("Rome") == shown.solved(capital).replace(
        "Paris", "Rome"
    )
    assert shown.answer_context == "Answer:"
    letters = PromptFormat("{question}\nA:{answer}", letters=True)
    assert letters.solved(capital) == "Capital of France?\nA. Rome\nB. Paris\nA:B"
    assert letters.answer("B") == "B"
    assert PromptFormat("{question} > {answer}", "\n").answer_context == ">"
    others = [Example(f"q{i}", f"a{i}") for i in range(5)]
    prompt, used = build_prompt(capital, others, shown, lambda text: len(text) < 100)
    assert used == 2 and prompt.startswith("Answer.\n\nQuestion: q3\nAnswer: a3\n\nQuestion: q4")
    assert prompt.endswith("\n\nQuestion: Capital of France?\nAnswer:")
    assert build_prompt(capital, others, shown, lambda text: False)[1] == 0
    for template in ("{question}", "{answer} {question}", "{question} {answer} {answer}"):
        with pytest.raises(ValueError, match="--template: got"):
            PromptFormat(template)


def test_demonstrations_follow_from_seed_and_index():
    pool = [Example(f"q{i}", "a", subject="ab"[i % 2]) for i in range(20)]
    chosen = demonstrations_for(pool[0], 3, pool, 5, seed=1)
    assert chosen == demonstrations_for(pool[0], 3, pool, 5, seed=1)
    assert chosen != demonstrations_for(pool[0], 4, pool, 5, seed=1)
    assert chosen != demonstrations_for(pool[0], 3, pool, 5, seed=2)
    assert {one.subject for one in chosen} == {"a"} and pool[0] not in chosen
    assert len(demonstrations_for(pool[0], 3, pool, 99, seed=1)) == 9
    assert len(demonstrations_for(Example("q", "a", subject="c"), 0, pool, 99, seed=1)) == 20


@torch.no_grad()
def test_likelihoods_are_those_of_the_model(model):
    texts = [("The cat", " sat"), ("a", "b"), ("x" * 90, "yz" * 5), ("Hi ", "you")]
    pairs = [token_pair(BYTES.encode, *text) for text in texts]
    assert pairs[3] == (BYTES.encode("Hi"), BYTES.encode(" you"))
    for (context, continuation), found in zip(pairs, likelihoods(model, pairs)):
        ids = torch.tensor([*context, *continuation])[-97:]
        log_probs = model(ids[None, :-1])[0].log_softmax(-1)[-len(continuation) :]
        total = log_probs.gather(-1, torch.tensor(continuation)[:, None]).sum()
        assert found.logprob == pytest.approx(float(total), abs=1e-3)
        assert found.num_tokens == len(continuation)
        assert found.is_greedy == (log_probs.argmax(-1).tolist() == continuation)
    greedy = int(model(torch.tensor([[5, 6]]))[0, -1].argmax())
    assert likelihoods(model, [([5, 6], [greedy])])[0].is_greedy
    with pytest.raises(
        ValueError, match="answer: got 97 tokens after a context of 1, need 1 or mo"
    ):
        likelihoods(model, [([1], [2] * 97)])
    with pytest.raises(ValueError, match="answer: got 1 tokens after a context of 0"):
        likelihoods(model, [([], [2])])


def answer_all(model, tokenizer, task, pool, num_shots, options):
    length = model.config.context_length
    questions = pose(tokenizer, length, task, pool, num_shots, options)
    return answer_posed(model, tokenizer, questions, options)


def examples():
    return [
        Example(f"{a} or {b}?", b, (a, b), "xy"[i % 2])
        for i, (a, b) in enumerate([("cat", "elephant"), ("oo", "p"), ("long answer", "s")])
    ]


@pytest.mark.parametrize("scoring", ["sum", "per_token", "answer_only"])
def test_scores_of_choices(model, scoring):
    shown = PromptFormat("Q: {question}\nA: {answer}", "\n")
    options = InContextOptions("multiple_choice", shown, scoring)
    answered = answer_all(model, BYTES, examples(), examples(), 1, options)
    for index, one in enumerate(answered):
        (other,) = demonstrations_for(one.example, index, examples(), 1, 0)
        prompt = f"{shown.solved(other)}\n{shown.context(one.example)}"
        for choice, score in zip(one.example.choices, one.scores, strict=True):
            found, alone = likelihoods(
                model,
                [token_pair(BYTES.encode, text, f" {choice}") for text in (prompt, "A:")],
            )
            wanted = {
                "sum": found.logprob,
                "per_token": found.logprob / found.num_tokens,
                "answer_only": found.logprob - alone.logprob,
            }[scoring]
            assert score == pytest.approx(wanted, abs=1e-3)
        assert one.given == one.example.choices[one.scores.index(max(one.scores))]
        assert one.is_correct == (one.given == one.example.answer) and one.question.num_shots == 1
    assert accuracy(answered).num_examples == 3
    by_subject = accuracy_by_subject(answered)
    assert {name: found.num_examples for name, found in by_subject.items()} == {"x": 2, "y": 1}
    mean, low, high = mean_logprob(answered)
    assert low <= mean <= high
    assert mean == pytest.approx(sum(one.scores[1] for one in answered) / 3)


def test_generated_answers_are_judged(model, monkeypatch):
    answers = iter(["He has 3 + 4 = 7 apples\n", "no idea", " Paris.", "Rome"])
    monkeypatch.setattr(
        "cs_lm.evaluation.in_context.generate_text",
        lambda _model, _tokenizer, prompts, _config: [next(answers) for _ in prompts],
    )
    for kind, task in [
        ("last_number", [Example("How many?", "3+4=7\n#### 7"), Example("How many?", "#### 8")]),
        ("exact_match", [Example("Capital?", "paris"), Example("Capital?", "paris")]),
    ]:
        options = InContextOptions(kind, PromptFormat())
        answered = answer_all(model, BYTES, task, [], 0, options)
        assert [one.is_correct for one in answered] == [True, False]
    with pytest.raises(ValueError, match="--num_shots: needs --demonstrations_path"):
        answer_all(model, BYTES, task, [], 2, options)


def test_completion_is_greedy_text(model):
    with torch.no_grad():
        best = model(torch.tensor([BYTES.encode("ab:")]))[0, -1, :128].topk(2).indices.tolist()
        model.lm_head.weight[128:] -= 5 * model.ln_final(model.token_embeddings.weight[58])
    task = [Example("ab", chr(i)) for i in best]
    options = InContextOptions("completion", PromptFormat("{question}:{answer}"))
    answered = answer_all(model, BYTES, task, [], 0, options)
    assert [one.is_correct for one in answered] == [True, False]


def test_completion_judges_the_answer_and_not_the_first_choice(model):
    with torch.no_grad():
        best = model(torch.tensor([BYTES.encode("ab:")]))[0, -1, :128].argmax().item()
    right, wrong = chr(best), chr((best + 1) % 128 or 7)
    options = InContextOptions("completion", PromptFormat("{question}:{answer}"))
    for choices in ((right, wrong), (wrong, right)):
        task = [Example("ab", right, choices), Example("ab", wrong, choices)]
        answered = answer_all(model, BYTES, task, [], 0, options)
        assert [one.is_correct for one in answered] == [True, False]
        assert mean_logprob(answered)[0] == pytest.approx(
            sum(one.scores[0] for one in answered) / 2
        )


def test_tokens_across_the_border_belong_to_the_continuation():
    """Bytes with the merges ab and bc; nothing is scored twice, or left out."""
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"bc"}
    encode = BPETokenizer(vocab, [(b"b", b"c"), (b"a", b"b")], []).encode
    for context, continuation in [("xa", "b"), ("ab", "c"), ("a", "b"), ("x ", "b"), ("x", "yz")]:
        first, second = token_pair(encode, context, continuation)
        assert first and second
        if (context, continuation) != ("a", "b"):  # a single token: both are encoded alone
            assert first + second == encode(context + continuation)


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(ValueError, match="got 0 tokens after a context of 1"):
        likelihoods(model, [([97], [])])
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
        with pytest.raises(NotANumberError):
            likelihoods(model, [([97], [98])])
        model.lm_head.weight.copy_(weight)
    many = Example("q", "0", tuple(map(str, range(27))), where="a.jsonl, line 1")
    with pytest.raises(ValueError, match="--letters: a.jsonl, line 1 has 27 choices"):
        PromptFormat(letters=True).prepared(many)


def test_a_question_is_not_its_own_demonstration():
    task = Example("q", "a", where="t.jsonl, line 1")
    copies = [Example("q", "a", where="/abs/t.jsonl, line 1"), Example("other", "a")]
    assert demonstrations_for(task, 0, copies, 5, 0) == copies[1:]


def test_gold_answers_are_labels_or_letters(tmp_path):
    """A choice may look like another one's letter or label."""
    path = written(tmp_path, "blood.csv", "Blood?,AB,O,A,B,B\n")
    assert read_examples([path])[0].answer == "O"
    record = {
        "question": "q",
        "answer": "1",
        "choices": {"text": list("wxyz"), "label": list("1234")},
    }
    path = written(tmp_path, "arc.jsonl", json.dumps(record))
    assert read_examples([path])[0].answer == "w"


def test_as_many_demonstrations_as_fit(model):
    """The model has 96 positions, an example 23 bytes."""
    pool = [Example(f"question number {i:2}", "yes") for i in range(9)]
    task = [Example("question number xx", "no")]
    options = InContextOptions("completion", PromptFormat("{question}: {answer}", "\n"))
    for wanted, fitted in [(0, 0), (1, 1), (3, 3), (4, 3), (9, 3)]:
        answered = answer_all(model, BYTES, task, pool, wanted, options)
        assert [one.question.num_shots for one in answered] == [fitted]


def test_wilson_by_hand_and_bootstrap():
    """8 of 10, 0 of 10 and 10 of 10 as published tables have them."""
    for k, bounds in [(8, (0.4902, 0.9433)), (0, (0.0, 0.2775)), (10, (0.7225, 1.0))]:
        assert wilson_interval(k, 10) == pytest.approx(bounds, abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap_interval(values)
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / 400 / 400)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_contamination_finds_words_in_a_row():
    task = [
        Example("The quick, brown fox jumps over", "the lazy dog"),
        Example("Short one", "here"),
        Example("An entirely different question of eight words", "yes"),
        Example("", "!"),
    ]
    text = "Once, THE quick brown fox: jumps over the lazy cat. A short one here!"
    for cut in range(0, len(text), 7):  # a word and an n-gram may lie in two blocks
        assert contaminated(task, [text[:cut], text[cut:]], 5) == [True, True, False, False]
    assert contaminated(task, list(text), 5) == [True, True, False, False]
    assert contaminated(task, [text], 9) == [False, True, False, False]
    assert contaminated(task, ["Short one, here"], 13) == [False, True, False, False]
    assert contaminated(task, [], 13) == [False] * 4
    long = [Example(f"{'g' * 300} {'a' * 300}", "t")]
    dna = ["x " + "g" * 250, "g" * 50 + " " + "a" * 300 + " t", "c" * 200_000]
    assert contaminated(long, dna, 2) == [True]
