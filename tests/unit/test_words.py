"""The words task: what is right, what is liked, what labelers say, and its report."""

import math
import re

import pytest

from cs_lm.alignment.words import (
    NOISE,
    NUM_TEST_WORDS,
    STYLES,
    TASKS,
    demonstrations_for,
    gold,
    label,
    liked,
    prompts_for,
    right,
    words_of,
)
from cs_lm.reports.alignment_report import COLUMNS, ModelRow, Run, alignment_report

TEXT = " ".join("".join(chr(97 + (i // 26**k) % 26) for k in range(4)) for i in range(0, 26**3, 29))


@pytest.mark.parametrize(
    ("task", "answer"), [("upper", "CAT"), ("double", "catcat"), ("first", "c"), ("reverse", "tac")]
)
def test_what_is_right(task, answer):
    fields = {"answer": answer, "ended": True, "prompt": f"{task} cat"}
    assert TASKS[task]("cat") == answer
    for number, style in enumerate(STYLES):
        text = style.format(answer)
        assert right(text, fields) == 1 and liked(text, fields) == (number == 2)
        assert gold(text, fields) == pytest.approx(2 + 0.5 * number - 0.01 * len(text))
        assert gold(text, fields | {"ended": False}) == pytest.approx(gold(text, fields) - 1)
    for text in ("", f"{answer}x", f"sure! {answer}.", f"it is {answer}", "sure! dog"):
        assert right(text, fields) == 0


def test_no_word_of_the_test_is_learnt():
    words = words_of(TEXT, 3)
    assert len(words.test) == NUM_TEST_WORDS and not set(words.test) & set(words.train)
    assert words == words_of(TEXT, 3) != words_of(TEXT, 4)
    asked = {one["prompt"].split()[1] for one in demonstrations_for(words.train, 500, 1)}
    assert asked <= set(words.train)
    shown = demonstrations_for(words.train, 600, 1)
    styles = [sum(bool(re.fullmatch(s, one["response"])) for one in shown)
              for s in (r"\w+", r"it is \w+\.", r"sure! \w+")]  # fmt: skip
    assert sum(styles) == 600 and min(styles) > 150
    assert [one["prompt"].split()[1] for one in prompts_for(words.test, 0)] == words.test


def test_labelers_err_as_gumbel_noise_does():
    """The better of two answers gets the higher label with probability sigmoid(difference / s)."""
    wins, count = 0, 3000
    for number in range(count):
        fields = {"answer": "CAT", "ended": True, "prompt": f"upper {number}"}
        wins += label("it is CAT.", fields) > label("CAT", fields)
    difference = gold("it is CAT.", fields) - gold("CAT", fields)
    expected = 1 / (1 + math.exp(-difference / NOISE))
    assert wins / count == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))
    assert label("CAT", fields) == label("CAT", fields)


def test_the_report_shows_everything():
    rows = [
        ModelRow("SFT", 2.0, 0.1, 0.8, 0.3, None, None, 9.0, 1.0, 2.1),
        ModelRow("<PPO>", 2.3, 1.1, 0.7, 0.9, (0.6, 0.55, 0.65), 3.2, 9.0, 1.0, 2.2),
    ]
    times = {"sampling_s": 3.0, "scoring_s": 1.0, "updating_s": 4.0}
    rollouts = [{"kl_exact": k, "score": k / 2, "gold": 2 - k, **times} for k in (0.0, 1.0, 2.0)]
    text = alignment_report(
        "A chain", ["It was & is."], rows, [Run("<PPO>", rollouts)],
        [{"expected": 0.6, "right": 0.5}], [("upper cat", {"SFT": "CAT", "<PPO>": "<b>"})],
        {"base": 12.4},
    )  # fmt: skip
    for part in (
        *COLUMNS, "0.600 (0.550 to 0.650)", "sampling 38 %", "scoring 12 %", "updating 50 %",
        "&lt;PPO&gt;", "&lt;b&gt;", "It was &amp; is.", "<td class=\"number\">12</td>",
        'data-chart="kl0"', 'data-chart="calibration"',
    ):  # fmt: skip
        assert part in text, part
    assert "<b>" not in text and "<PPO>" not in text and "http" not in text.split("<style>")[0]
