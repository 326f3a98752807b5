"""Templates and records of conversations."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs_lm.alignment.conversations import (
    AlpacaTemplate,
    ChatTemplate,
    Message,
    check_conversation,
    template_of,
)
from cs_lm.alignment.records import read_demonstrations, read_prompts, read_rankings
from cs_lm.errors import UserError
from cs_lm.tokenizer import BPETokenizer

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB = {i: bytes([i]) for i in range(256)} | {256: b"\n\n", 257: b"e\n", 258: b"##"}
MERGES = [(b"\n", b"\n"), (b"e", b"\n"), (b"#", b"#")]
TOKENIZER = BPETokenizer(VOCAB, MERGES, SPECIAL)
CONTROL = {TOKENIZER.encode(token)[0] for token in SPECIAL}
TEMPLATES = [ChatTemplate(TOKENIZER), AlpacaTemplate(TOKENIZER)]

texts = st.text(max_size=12) | st.sampled_from(["<|end|>", "a<|user|>b", "x\n", "\n\n", "#", "e"])


@st.composite
def conversations(draw, ends_with_answer=True):
    found = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found += [Message("user", draw(texts), draw(texts)), Message("assistant", draw(texts))]
    return tuple(found)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@given(conversation=conversations())
def test_what_is_asked_is_the_beginning_of_what_was_learnt(template, conversation):
    rendered = template.render(conversation)
    asked = template.render_for_completion(conversation[:-1])
    assert rendered.token_ids[: len(asked)] == asked
    assert not rendered.is_answer[len(asked) - 1] and all(rendered.is_answer[len(asked) :])
    answer = rendered.token_ids[len(asked) :]
    assert answer[-1] == template.end_id
    assert TOKENIZER.decode(answer[:-1]) == conversation[-1].content


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@given(conversation=conversations())
def test_control_tokens_come_from_the_template_only(template, conversation):
    """One opening and one end for each turn, whatever the texts contain or end with."""
    token_ids, is_answer = template.render(conversation)
    num_answers = sum(message.role == "assistant" for message in conversation)
    found = [i for i in token_ids if i in CONTROL]
    if template.name == "chat":
        assert len(found) == 2 * len(conversation)
        assert found.count(template.end_id) == len(conversation)
    else:
        assert found == [template.end_id] * num_answers
    ends = [i for i, answers in zip(token_ids, is_answer) if answers and i in CONTROL]
    assert ends == [template.end_id] * num_answers  # each end token is a target


def test_chat_of_a_short_conversation():
    chat = (Message("system", "S"), Message("user", "U", "C"), Message("assistant", "A"))
    token_ids, is_answer = ChatTemplate(TOKENIZER).render(chat)
    text = "<|user|>S<|end|><|user|>U\n\nC<|end|><|assistant|>A<|end|>"
    assert token_ids == TOKENIZER.encode(text)
    assert is_answer == [False] * (len(token_ids) - 2) + [True, True]
    with_system = BPETokenizer(VOCAB, MERGES, [*SPECIAL, "<|system|>"])
    assert with_system.decode(ChatTemplate(with_system).render(chat).token_ids[:1]) == "<|system|>"


def test_alpaca_is_plain_text():
    template = AlpacaTemplate(TOKENIZER)
    asked = TOKENIZER.decode(template.render_for_completion((Message("user", "Add.", "1 2"),)))
    assert asked.startswith("Below is an instruction that describes a task, paired with an input")
    assert asked.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    asked = TOKENIZER.decode(template.render_for_completion((Message("user", "Hi"),)))
    assert "paired" not in asked and "### Input" not in asked


def test_the_template_follows_from_the_tokenizer():
    assert template_of(TOKENIZER).name == "chat"
    plain = BPETokenizer(VOCAB, MERGES, SPECIAL[:1])
    assert template_of(plain).name == "alpaca"
    with pytest.raises(UserError, match=r"chat needs the special token <\|user\|>"):
        template_of(plain, "chat")


@pytest.mark.parametrize("roles, message", [
    ("", "no message of the user"),
    ("s", "no message of the user"),
    ("a", "message 1 is of 'assistant', need 'user'"),
    ("suu", "message 3 is of 'user', need 'assistant'"),
    ("us", "message 2 is of 'system'"),
])  # fmt: skip
def test_turns(roles, message):
    names = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(UserError, match=message):
        check_conversation(tuple(Message(names[role], "x") for role in roles))


def test_an_answered_conversation_is_not_completed():
    with pytest.raises(UserError, match="ends with the assistant's answer"):
        TEMPLATES[0].render_for_completion((Message("user", "a"), Message("assistant", "b")))


# ---- records ----

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
Q = (Message("user", "Q"),)
QA = (*Q, Message("assistant", "A"))


def written(tmp_path, *records, as_list=False):
    path = tmp_path / "data.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    text = json.dumps(list(records), indent=2) if as_list else "\n\n".join(lines)
    path.write_text("\ufeff" + text, encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("record", [
    {"messages": [USER, ANSWER]},
    {"instruction": "Q", "output": "A"},
    {"instruction": "Q", "input": "", "output": "A", "source": 1},
    {"prompt": "Q", "response": "A"},
    {"prompt": "Q", "completion": "A"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"question": "Q", "answer": "A"},
])  # fmt: skip
def test_demonstrations(tmp_path, record, as_list):
    found = read_demonstrations(written(tmp_path, record, record, as_list=as_list))
    assert [one.conversation for one in found] == [QA, QA]
    assert found[1].where.endswith("record 2" if as_list else "line 3")


def test_an_input_is_kept_apart(tmp_path):
    record = {"instruction": "Q", "input": "I", "output": "A"}
    (found,) = read_demonstrations(written(tmp_path, record))
    assert found.conversation[0] == Message("user", "Q", "I")


@pytest.mark.parametrize("record, answers, ranks", [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "AB", (1, 2)),
    ({"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}, "AB", (1, 2)),
    ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "B"}]}, "AB", (1, 2)),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B"}]},
     "AB", (1, 2)),
    ({"prompt": "Q", "messages": [USER, ANSWER], "chosen": [USER, ANSWER],
      "rejected": [USER, {**ANSWER, "content": "B"}]}, "AB", (1, 2)),
    ({"prompt": "Q", "responses": ["A", "B", "C"]}, "ABC", (1, 2, 3)),
    ({"prompt": "Q", "responses": ["A", "B", "C"], "ranks": [2, 1, 2]}, "ABC", (2, 1, 2)),
])  # fmt: skip
def test_rankings(tmp_path, record, answers, ranks):
    (found,) = read_rankings(written(tmp_path, record))
    assert (found.prompt, "".join(found.answers), found.ranks) == (Q, answers, ranks)


def test_prompts(tmp_path):
    records = [
        {"prompt": "Q", "answer": "7"},
        {"question": "Q", "answer": "7"},
        {"messages": [USER]},
        {"prompt": "Q", "messages": [USER, ANSWER]},
    ]
    found = read_prompts(written(tmp_path, *records))
    assert [one.conversation for one in found] == [Q] * 4
    assert [one.fields for one in found] == [{"answer": "7"}, {"answer": "7"}, {}, {}]


@pytest.mark.parametrize("read, record, message", [
    (read_demonstrations, "{", "line 1: is not JSON"),
    (read_demonstrations, "7", "line 1: got '7', need a JSON object"),
    (read_demonstrations, {"prompt": "Q"}, "has no answer"),
    (read_demonstrations, {"text": "Q"}, "has none of instruction, prompt"),
    (read_demonstrations, {"prompt": 3, "response": "A"}, "prompt is 3, need a text"),
    (read_demonstrations, {"prompt": "Q", "response": None}, "response is null, need a text"),
    (read_demonstrations, {"prompt": "Q", "response": "\ud800"}, "half of a surrogate pair"),
    (read_demonstrations, {"messages": []}, "need a list of them"),
    (read_demonstrations, {"messages": [USER]}, "the last message is not the assistant's"),
    (read_demonstrations, {"messages": [{"role": "bot"}]}, "message 1 has the role 'bot'"),
    (read_demonstrations, {"messages": [USER, USER]}, "message 2 is of 'user'"),
    (read_rankings, {"prompt": "Q", "chosen": "A"}, "has no 'rejected'"),
    (read_rankings, {"prompt": "Q", "responses": ["A"]}, "need a list of two or more"),
    (read_rankings, {"prompt": "Q", "responses": ["A", "B"], "ranks": [1]}, "need a whole number"),
    (read_rankings, {"prompt": "Q", "responses": ["A", "B"], "ranks": [0, 1]}, "need a whole num"),
    (read_rankings, {"chosen": "A", "rejected": "B"}, "has no prompt"),
    (read_rankings, {"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "message 1 is of"),
    (read_prompts, {"messages": [USER, ANSWER]}, "does not end with a message of the user"),
])  # fmt: skip
def test_bad_records_are_named(tmp_path, read, record, message):
    with pytest.raises(UserError, match=message) as error:
        read(written(tmp_path, record))
    assert "data.jsonl, line 1" in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="--data: got 'no.json', which is not a file"):
        read_demonstrations(["no.json"])
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="--prompts: .*empty.jsonl: holds no record"):
        read_prompts([str(tmp_path / "empty.jsonl")])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8 at byte offset 12"):
        read_prompts([str(tmp_path / "*.jsonl")])
