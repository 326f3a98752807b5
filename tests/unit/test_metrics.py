import io
import json
import logging
import sys

import pytest

from cs_lm.training import console
from cs_lm.training.console import Display, Stopwatch, format_duration, log_to
from cs_lm.training.metrics_log import MetricsLog, read_metrics
from cs_lm.training.plots import plot_runs
from cs_lm.training.throughput import Speed


def test_log_round_trip(tmp_path):
    log = MetricsLog(tmp_path / "new" / "m.jsonl")
    log.write("config", step=0, prompt="né", config={"max_norm": float("inf")})
    log.write("train", step=1, loss_nats=2.5, grad_norm=float("nan"), lr=float("inf"))
    assert list(read_metrics(log.path)) == [
        {"kind": "config", "step": 0, "prompt": "né", "config": {"max_norm": None}},
        {"kind": "train", "step": 1, "loss_nats": 2.5, "grad_norm": None, "lr": None},
    ]


def test_a_damaged_line_is_left_out_and_named(tmp_path):
    path = tmp_path / "m.jsonl"
    first, third = '{"kind": "a", "step": 1}\n', '{"kind": "c", "step": 3}\n'
    path.write_text(first + '{"kind": "b", "st', encoding="utf-8")
    assert [r["kind"] for r in read_metrics(path)] == ["a"]
    path.write_bytes((first + '{"prompt": "é').encode()[:-1])
    assert [r["kind"] for r in read_metrics(path)] == ["a"]
    path.write_text(first + '{"ki\n' + third, encoding="utf-8")
    said = []
    with log_to(said.append):
        assert [r["kind"] for r in read_metrics(path)] == ["a", "c"]
    assert said == [f"WARNING: SKIPPED line 2 of {str(path)!r}: it is damaged"]
    with pytest.raises(FileNotFoundError, match="metrics: got .* is not a file"):
        read_metrics(tmp_path / "no.jsonl")


def test_discard_after(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.discard_after(3)
    for kind, step in [("config", 0), ("train", 3), ("train", 4), ("valid", 4), ("end", 3)]:
        log.write(kind, step=step)
    log.discard_after(3)
    assert [(r["kind"], r["step"]) for r in read_metrics(log.path)] == [("config", 0), ("train", 3)]


def test_stopwatch_leaves_pauses_out(monkeypatch):
    now = iter([0.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.pause():
        pass
    assert watch.elapsed_s == 16.0


@pytest.mark.parametrize(
    "seconds, shown", [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3661, "1:01:01")]
)
def test_format_duration(seconds, shown):
    assert format_duration(seconds) == shown


def test_plain_lines_when_not_a_terminal():
    out = io.StringIO()
    display = Display(20, 0, out)
    display.update(5)
    display.report(5, 2.5, 1e-3, 0.75, Speed(12345.6, 3e9, 0.517, 61))
    display.write_line("hello")
    display.close()
    assert out.getvalue().splitlines() == [
        "step 5/20 | loss 2.5000 | lr 1.00e-03 | norm 0.75 | 12,346 tokens/s (52% of peak)"
        " | ETA 1:01",
        "hello",
    ]


def test_bar_on_a_terminal():
    pytest.importorskip("tqdm", reason="tqdm is not installed")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    display = Display(20, 0, out)
    display.update(5)
    display.report(5, 2.5, 1e-3, 0.75, Speed(12345.6, 3e9, 0.517, 61))
    display.write_line("validation")
    display.close()
    assert "5/20" in out.getvalue() and "validation\n" in out.getvalue()
    assert "loss 2.5000 | lr 1.00e-03 | norm 0.75 | 12,346 tokens/s" in out.getvalue()


def write_log(path, num_steps=30):
    log = MetricsLog(path)
    log.write("config", step=0)
    for step in range(1, num_steps + 1):
        log.write("train", step=step, tokens=64 * step, loss_nats=3 + 1 / step)
    log.write("valid", step=num_steps, tokens=64 * num_steps, loss_nats=3.2, bits_per_byte=1.5)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_log(tmp_path / "m.jsonl")
    png = plot_runs([tmp_path / "m.jsonl"], tmp_path / "new" / "loss.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000


def test_plot_shows_both_losses_and_tokens(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    write_log(tmp_path / "m.jsonl")
    plot_runs([tmp_path / "m.jsonl"], tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels[0] == "train" and labels[-1].startswith(
        "validation (last: 3.200 nats, 1.500 bits"
    )
    assert list(axes.lines[0].get_ydata()) == [3 + 1 / step for step in range(1, 31)]
    assert axes.get_ylabel() == "loss [nats per token]"
    upper = axes.child_axes[0]
    assert upper.get_xlabel() == "trained tokens"
    drawn[0].draw_without_rendering()
    assert upper.get_xlim()[1] == pytest.approx(64 * axes.get_xlim()[1])


def test_plot_without_a_loss(tmp_path):
    MetricsLog(tmp_path / "m.jsonl").write("config", step=0)
    with pytest.raises(ValueError, match="holds no loss yet; train some steps first"):
        plot_runs([tmp_path / "m.jsonl"], tmp_path / "loss.png")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    write_log(tmp_path / "m.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"needs the package matplotlib; install the extra with"):
        plot_runs([tmp_path / "m.jsonl"], tmp_path / "loss.png")


def test_log_lines_are_plain_json(tmp_path):
    write_log(tmp_path / "m.jsonl", 2)
    for line in (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_messages_appear_once_and_only_while_entered(capsys):
    """Also where a program has set up logging for itself."""
    root = logging.getLogger()
    before = root.handlers[:]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    try:
        said, inner = [], []
        log = logging.getLogger("cs_lm")
        with log_to(said.append):
            log.info("one")
            with log_to(inner.append):
                log.warning("two")
            log.error("three")
        assert said == ["one", "error: three"] and inner == ["WARNING: two"]
        assert capsys.readouterr().err == ""
        log.warning("four")
        assert "four" in capsys.readouterr().err and len(said) == 2
    finally:
        root.handlers[:] = before
