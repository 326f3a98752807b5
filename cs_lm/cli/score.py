"""`python -m cs_lm score`: how surprised a trained model is by each token of a text.

The text comes from --text, --text_path or standard input. A terminal shows it in colours, from
expected to surprising; otherwise each token is a line. --html_path writes a page.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import decoded, not_empty, readable_errors
from cs_lm.cli._outputs import PAGE, output_problems
from cs_lm.cli._prompt import has_colours
from cs_lm.config.fields import is_unicode, not_unicode, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import (
    checkpoint_setting,
    device_setting,
    validate_checkpoint,
    validate_run,
)
from cs_lm.device import resolve_device
from cs_lm.errors import Problem
from cs_lm.evaluation.scoring import TokenScore, score_tokens, summary
from cs_lm.reports.scored_text import ScoredToken, for_browser, for_terminal, legend
from cs_lm.storage.atomic import atomic_write
from cs_lm.training.run_dir import RunFolder, load_trained

VIEWS = ("auto", "colours", "lines", "jsonl")


@dataclass(frozen=True)
class ScoreConfig:
    out_dir: str = setting("", "folder of the run; required")
    checkpoint: str = checkpoint_setting()
    text: str | None = setting(None, "text to score")
    text_path: str | None = setting(None, "file with the text to score")
    view: str = setting("auto", "auto: colours on a terminal, else lines", choices=VIEWS)
    num_alternatives: int = setting(3, "also show this many of the likeliest tokens")
    html_path: str | None = setting(None, "write a page with the coloured text to this file")
    device: str = device_setting()

    def validate(self) -> list[Problem]:
        found = validate_run(self.out_dir)
        if self.text is not None and self.text_path is not None:
            found.append(Problem("--text, --text_path", "got both", fix="give one of the two"))
        if self.text is not None and not is_unicode(self.text):
            found.append(not_unicode("--text", self.text))
        if self.text_path is not None and not Path(self.text_path).is_file():
            found.append(Problem("--text_path", f"got {self.text_path!r}, which is not a file"))
        if self.num_alternatives < 0:
            found.append(Problem("--num_alternatives", f"got {self.num_alternatives}", "0 or more"))
        inputs = [self.text_path] if self.text_path is not None else []
        found += output_problems("--html_path", self.html_path, PAGE, inputs)
        return found + validate_checkpoint(self.checkpoint)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ScoreConfig, "python -m cs_lm score", __doc__, argv)
    text = _text(config)
    device = resolve_device(config.device)
    trained = load_trained(RunFolder(config.out_dir), config.checkpoint, device)
    vocab = trained.tokenizer.vocab
    scores = score_tokens(trained.model, trained.tokenizer.encode(text), config.num_alternatives)
    total = summary(scores, vocab)
    facts = f"{config.out_dir}, {config.checkpoint}, step {trained.iteration}: "
    if total.num_tokens:
        facts += (
            f"{total.num_tokens:,} tokens, {total.loss_nats:.4f} nats per token, "
            f"{total.bits_per_byte:.4f} bits per byte"
        )
    else:
        facts += "nothing to score, because the first token has none before it"
    view = config.view
    if view == "auto":
        view = "colours" if has_colours(sys.stdout) else "lines"
    if view == "colours":
        print(f"{for_terminal(_shown(scores, vocab))}\n\n{legend()}\n{facts}")
    else:
        for score in scores:
            print(_json_line(score, vocab) if view == "jsonl" else _line(score, vocab))
        print(facts, file=sys.stderr)
    if config.html_path is not None:
        page = for_browser("Surprise of each token", facts, _shown(scores, vocab))
        atomic_write(config.html_path, page.encode("utf-8"))
        print(config.html_path, file=sys.stderr)
    return 0


def _text(config: ScoreConfig) -> str:
    where, text = "--text", config.text
    if text is None:
        path = config.text_path
        where = "standard input" if path is None else f"--text_path: {path!r}"
        content = sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
        text = decoded(where, content)
    return not_empty(where, text)


def _name(token_id: int, vocab: dict[int, bytes]) -> str:
    return vocab.get(token_id, b"").decode("utf-8", "replace")


def _shown(scores: Sequence[TokenScore], vocab: dict[int, bytes]) -> list[ScoredToken]:
    """Tokens with whole characters: one that ends inside a character is joined to the next."""
    shown, pending, nats = [], b"", None
    for score in scores:
        pending += vocab[score.token_id]
        if score.nats is not None:
            nats = score.nats if nats is None else nats + score.nats
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError:
            continue
        others = [(_name(i, vocab), surprise) for i, surprise in score.alternatives]
        shown.append(ScoredToken(text, nats, others))
        pending, nats = b"", None
    return shown


def _line(score: TokenScore, vocab: dict[int, bytes]) -> str:
    nats = "-" if score.nats is None else f"{score.nats:.4f}"
    others = "  ".join(f"{json.dumps(_name(i, vocab))} {n:.3f}" for i, n in score.alternatives)
    return f"{nats:>9}  {json.dumps(_name(score.token_id, vocab)):<16}  {others}".rstrip()


def _json_line(score: TokenScore, vocab: dict[int, bytes]) -> str:
    return json.dumps(
        {
            "token_id": score.token_id,
            "token": _name(score.token_id, vocab),
            "nats": score.nats,
            "rank": score.rank,
            "alternatives": [
                {"token_id": i, "token": _name(i, vocab), "nats": n} for i, n in score.alternatives
            ],
        }
    )
