"""Pages and plots of runs."""

import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest

from cs_lm.errors import UserError
from cs_lm.reports.curves import Series, chart, json_data, short, ticks
from cs_lm.reports.page import page
from cs_lm.reports.run_report import run_report
from cs_lm.reports.scored_text import ScoredToken, for_browser, for_terminal, surprise_class
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.plots import AGAINST, SHOWN, plot_runs

VOID = {"meta", "br", "link", "img", "input"}


class Balanced(HTMLParser):
    """Fails for an element that is not closed, or that loads something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href"} & {name for name, _ in attributes}, "no network"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def records(spoilt=False):
    config = {"model": {"d_model": 8, "hooks": "<b>"}, "lr": 0.1, "prompt": None, "paths": ["a"]}
    yield {"kind": "config", "step": 0, "num_steps": 40, "num_parameters": 1234, "config": config,
           "versions": {"torch": "9.9"}, "device": "cpu", "train_tokens": 320}  # fmt: skip
    for step in range(1, 41):
        yield {
            "kind": "train",
            "step": step,
            "tokens": 16 * step,
            "loss_nats": None if spoilt and step == 7 else 5 - step / 20,
            "lr": 1e-4 * step,
            "grad_norm": 1.0,
            "tokens_per_s": 100.0,
            "model_flops_per_s": 5e4,
            "elapsed_s": 0.5 * step,
            **({"spike": True} if spoilt and step == 9 else {}),
        }
        if step % 20 == 0:
            yield {"kind": "valid", "step": step, "tokens": 16 * step, "loss_nats": 6 - step / 20,
                   "perplexity": 9.0, "bits_per_byte": 2.5}  # fmt: skip
            yield {"kind": "sample", "step": step, "tokens": 1, "prompt": "<i>", "text": "</div>"}
    if spoilt:
        yield {"kind": "bad_step", "step": 7, "file": "bad.pt"}
        yield {"kind": "resume", "step": 20}
    yield {"kind": "end", "step": 40, "elapsed_s": 20.0}


def test_report_is_one_whole_page_that_loads_nothing():
    text = run_report("my <run>", records())
    shown = Balanced(text).text
    assert "my <run>" in shown and "</div>" in shown and "1,234" in shown
    assert "model.hooks<b>" in shown.replace("\n", "") and "torch9.9" in shown.replace("\n", "")
    assert "4.0000 nats at step 40" in shown and "0:00:20 h:min:s" in shown
    assert "http" not in text and text.count("<svg") == 4 and "None." in shown
    data = re.search(r'id="loss">(.*?)</script>', text).group(1)
    series = json.loads(data)["series"]
    assert series[0]["points"][0] == [1, 4.95] and series[1]["points"][-1] == [40, 4.0]


def test_report_names_faults():
    shown = Balanced(run_report("run", records(spoilt=True))).text
    for fault in (
        "step 7: the loss was not finite",
        "step 9: the loss rose by more than 10 %",
        "step 7: the loss or a gradient was not finite; the step was saved to bad.pt",
        "step 20: the run was resumed",
    ):
        assert fault in shown


def test_report_of_a_run_that_has_just_begun():
    shown = Balanced(run_report("run", list(records())[:1])).text
    assert "nothing was logged" in shown and "None were drawn." in shown
    Balanced(run_report("run", []))


def test_chart_data_cannot_leave_its_element():
    assert "</script>" not in json_data("a", {"x": "</script><b>"})[:-9]
    Balanced(chart("a", "</svg>", "<y>", [Series("</svg>", [(0, 1.0), (5000, 2.0)])]))
    many = [(float(x), 0.0) for x in range(100_001)]
    data = json.loads(re.search(r">(\{.*\})<", chart("a", "x", "y", [Series("s", many)])).group(1))
    points = data["series"][0]["points"]
    assert len(points) == 2000 and points[0] == [0.0, 0.0] and points[-1] == [100_000.0, 0.0]


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(7, 150) == [50, 100, 150]
    for low, high in [(0.3, 0.31), (-5, 1e6), (1e-9, 3e-9)]:
        found = ticks(low, high)
        assert 2 <= len(found) <= 7 and all(low - 1e-12 <= x <= high + 1e-12 for x in found)
    assert [short(x) for x in (0, 1500, 2e6, 0.25, 1e-5)] == ["0", "1.5k", "2M", "0.25", "1e-05"]


def test_scored_text():
    assert [surprise_class(x) for x in (0.5, 1.5, 3, 5, 7, 20)] == [0, 1, 2, 3, 4, 5]
    tokens = [ScoredToken("<a>", None, []), ScoredToken("b\n", 7.0, [('"', 0.1)])]
    assert re.sub(r"\033\[[\d;]*m", "", for_terminal(tokens)) == "<a>b\n"
    assert for_terminal(tokens).endswith("\033[0m\n")
    text = for_browser("t", "facts", tokens)
    assert "<a>b" in Balanced(text).text and "7.000 nats" in text
    Balanced(page("a & b", "<p>x</p>", script="1 < 2"))


@pytest.fixture
def two_logs(tmp_path):
    paths = []
    for name in ("first", "second"):
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for record in records():
            log.write(**record)
        paths.append(log.path)
    return paths


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("show", SHOWN)
@pytest.mark.parametrize("count", [1, 2])
def test_plots_of_runs(two_logs, tmp_path, ending, show, count):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for against in AGAINST if ending == "svg" else AGAINST[:1]:
        path = plot_runs(two_logs[:count], tmp_path / f"{against}.{ending}", against, show)
        if ending == "png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


def test_axes_of_a_plot(two_logs, tmp_path, monkeypatch):
    """A token takes 50,000 / 100 FLOPs; an evaluation stands at the time of its step."""
    from cs_lm.training import plots

    run = plots._Run("run", list(records()))
    valid = run.of_kind("valid")[0]
    assert plots._axis("flops", run, 20.0).value(valid) == pytest.approx(320 * 500)
    assert plots._axis("time", run, 20.0).value(valid) == 10
    of_long_runs = plots._axis("time", run, 36_000.0)
    assert of_long_runs.label == "training time [h]"
    assert of_long_runs.value(valid) == pytest.approx(10 / 3600)
    assert (
        plots._axis("epoch", run, 20.0).value(valid) == 1
        and plots._axis("tokens", run, 20.0).value(valid) == 320
    )
    with pytest.raises(UserError, match="plot: the log of 'x' has no times; draw against step"):
        plots._axis("time", plots._Run("x", []), 0.0)
