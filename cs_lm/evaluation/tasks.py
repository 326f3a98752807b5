"""Tasks: questions with answers, from JSONL and CSV files as people have them."""

import csv
import glob
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from cs_lm.errors import UserError

KINDS = ("multiple_choice", "completion", "exact_match", "last_number")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPLITS = re.compile(r"[_-](train|dev|val|valid|validation|test)$")
_QUESTION = ("question", "prompt", "context", "text")
_ANSWER = ("answer", "target", "label", "gold", "completion")


@dataclass(frozen=True)
class Example:
    """One question.

    choices  the answers to choose from; empty: the answer is free text
    answer   the right answer, which is one of the choices if there are any
    subject  a part of the task, such as a field of knowledge
    where    the file and line that it comes from
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""
    where: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that follow from the question and its choices."""
        content = json.dumps([self.question, *self.choices])
        return hashlib.sha256(content.encode("utf-8")).hexdigest()[:12]


def read_examples(paths: Sequence[str], flag: str = "--task_path") -> list[Example]:
    """The examples of JSONL and CSV files, or of patterns such as `mmlu/*_val.csv`.

    JSONL: objects with "question" (or "prompt", "context"), "answer" (or "target", "label") and
    perhaps "choices" (a list) and "subject"; with choices, the answer is one of them, its number
    from 0, or its letter. CSV with a first line of such names, or without one, as MMLU's: question,
    choices, letter of the answer. Without a subject, the name of the file is the subject, less an
    ending like `_dev`.
    Raises: UserError for a missing or empty file, or a record that is not understood.
    """
    examples = []
    for file in files_named(paths, flag):
        of_file = _read_file(file)
        if not of_file:
            raise UserError(f"{flag}: {str(file)!r} holds no example; leave it out")
        examples += of_file
    return examples


def kind_of(examples: Sequence[Example]) -> str:
    """What the answers look like. Raises: UserError if they are of different kinds."""
    first = examples[0]
    kind = _kind_of_one(first)
    for other in examples:
        if _kind_of_one(other) != kind:
            raise UserError(
                f"--kind: the answers differ: {first.where} looks like {kind}, {other.where} like "
                f"{_kind_of_one(other)}; evaluate them apart, or give --kind"
            )
    return kind


def _kind_of_one(example: Example) -> str:
    if example.choices:
        return "multiple_choice"
    return "last_number" if "####" in example.answer else "exact_match"


def last_number(text: str) -> str | None:
    """The last number in the text, without thousands separators and trailing zeros."""
    found = re.findall(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", text)
    if not found:
        return None
    number = Decimal(found[-1].replace(",", ""))
    return format(number.normalize(), "f") if number else "0"


_LETTER = r"\(?([{letters}])\)?(?![\w'])"


def chosen_letter(text: str, num_choices: int = 4) -> str | None:
    """The letter of the answer that a text states, or None.

    It stands after "answer is", or is the first word, or stands alone on a line. A letter
    elsewhere is an ordinary word.
    """
    letter = _LETTER.format(letters=LETTERS[:num_choices])
    for pattern in (rf"(?i:answer is):?\s*{letter}", rf"^\s*{letter}\s*(?:[.:,]|$)"):
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1]
    return None


def normalised(text: str) -> str:
    """For exact match: lower case, without outer punctuation, one space between words."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


def files_named(paths: Sequence[str], flag: str) -> Iterator[Path]:
    """The files of paths and patterns; those of a pattern are sorted by name.

    Raises: UserError for a path that is neither.
    """
    for pattern in paths:
        for path in map(Path, sorted(glob.glob(pattern)) or [pattern]):
            if not path.is_file():
                raise UserError(
                    f"{flag}: got {pattern!r}, which is not a file, nor a pattern of files"
                )
            yield path


def text_of_file(path: Path) -> str:
    """The whole text, without a byte order mark. Raises: UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte offset {error.start}") from None


def _read_file(path: Path) -> list[Example]:
    text = text_of_file(path)
    subject = _SPLITS.sub("", path.stem)
    read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
    return read(path, text, subject)


def _read_jsonl(path: Path, text: str, subject: str) -> list[Example]:
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: got {line[:40]!r}, need a JSON object")
        examples.append(_example(record, subject, f"{path}, line {number}"))
    return examples


def _read_csv(path: Path, text: str, subject: str) -> list[Example]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        numbered = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error})") from None
    if not numbered:
        return []
    heads = [head.strip().casefold() for head in numbered[0][1]]
    places = [f"{path}, line {number}" for number, _ in numbered]
    if set(heads) & set(_QUESTION) and set(heads) & set(_ANSWER):
        records = []
        for where, (_, row) in zip(places[1:], numbered[1:]):
            if len(row) != len(heads):
                raise UserError(
                    f"{where}: got {len(row)} columns, need {len(heads)}, as the first line has"
                )
            record = dict(zip(heads, row))
            letters = [record[h] for h in heads if len(h) == 1 and h.upper() in LETTERS]
            records.append(record | {"choices": letters} if letters else record)
        places = places[1:]
    else:  # MMLU's: no heads
        records = []
        for where, (_, row) in zip(places, numbered):
            question, choices, letter = row[0], row[1:-1], row[-1].strip().upper()
            if len(row) < 4 or letter not in LETTERS[: len(choices)]:
                raise UserError(
                    f"{where}: got {len(row)} columns, the last one {row[-1].strip()[:20]!r}, need "
                    f"a first line with names of columns (one of {', '.join(_QUESTION)}, and one "
                    f"of {', '.join(_ANSWER)}), or a question, two or more choices and the letter "
                    "of one of them"
                )
            answer = LETTERS.index(letter)
            records.append({"question": question, "choices": choices, "answer": answer})
    return [_example(record, subject, where) for record, where in zip(records, places)]


def _example(record: dict[str, Any], subject: str, where: str) -> Example:
    def first_of(names: Sequence[str]) -> Any:
        for name in names:
            if record.get(name) is not None:
                return record[name]
        raise UserError(f"{where}: has none of {', '.join(names)}")

    question, answer = first_of(_QUESTION), first_of(_ANSWER)
    choices = record.get("choices") or ()
    if isinstance(choices, dict):  # as Hugging Face's datasets have them
        labels = choices.get("label")
        choices = choices.get("text", ())
        if isinstance(labels, list) and answer in labels:
            answer = labels.index(answer)
    if not isinstance(choices, (list, tuple)):
        raise UserError(f"{where}: got choices {choices!r}, need a list")
    choices = tuple(str(choice).strip() for choice in choices)
    if not all(choices):
        raise UserError(f"{where}: choice {choices.index('') + 1} is empty")
    if choices:
        answer = _chosen(answer, choices, where)
    question, answer = str(question).strip(), str(answer).strip()
    for name, text in (("question", question), ("answer", answer)):
        if not text:
            raise UserError(f"{where}: the {name} is empty")
    subject = str(record.get("subject") or subject)
    return Example(question, answer, choices, subject, where)


def _chosen(answer: Any, choices: tuple[str, ...], where: str) -> str:
    """The choice that a text, a letter or a number from 0 names."""
    text = str(answer).strip()
    if text in choices and not isinstance(answer, int):
        return text
    place = None
    if len(text) == 1 and text.upper() in LETTERS:
        place = LETTERS.index(text.upper())
    elif text.isdecimal():
        place = int(text)
    if place is None or place >= len(choices):
        raise UserError(f"{where}: got answer {answer!r}, need one of the {len(choices)} choices")
    return choices[place]
