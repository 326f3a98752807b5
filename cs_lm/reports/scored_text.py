"""A text in which each token's colour shows how surprised a model was by it."""

from collections.abc import Sequence
from typing import NamedTuple

from cs_lm.reports.page import escaped, page

# Upper bounds [nats] of the classes, and their colours for a terminal (xterm's 256).
CLASSES_NATS = (1.0, 2.0, 4.0, 6.0, 9.0)
_TERMINAL = (None, 230, 222, 215, 209, 203)
_STYLE = """\
.text span { border-radius: 3px; } .text span:hover { outline: 2px solid var(--accent); }
.s1 { background: #fff3bf; } .s2 { background: #ffe066; } .s3 { background: #ffc078; }
.s4 { background: #ff922b; } .s5 { background: #fa5252; }
.s1, .s2, .s3, .s4, .s5 { color: #1c1d21; }
.first { color: var(--dim); }
"""


class ScoredToken(NamedTuple):
    """A token to show. nats is None for the first one, which has no score."""

    text: str
    nats: float | None
    alternatives: list[tuple[str, float]]


def surprise_class(nats: float) -> int:
    """0 (expected) to 5: how many of `CLASSES_NATS` are below."""
    return sum(nats > bound for bound in CLASSES_NATS)


def for_terminal(tokens: Sequence[ScoredToken]) -> str:
    """The text with colours, as escape codes; line ends stay uncoloured."""
    return "".join(_painted(token) for token in tokens)


def _painted(token: ScoredToken) -> str:
    colour = None if token.nats is None else _TERMINAL[surprise_class(token.nats)]
    # a line end inside a coloured stretch would colour the rest of the line
    plain = token.text.rstrip("\n")
    if colour is None or not plain:
        return token.text
    return f"\033[38;5;16;48;5;{colour}m{plain}\033[0m{token.text[len(plain) :]}"


def legend() -> str:
    """The classes in words and colours, for a terminal."""
    bounds = ("0", *(f"{bound:g}" for bound in CLASSES_NATS))
    names = [f" from {low} nats " for low in bounds]
    return "".join(_painted(ScoredToken(n, float(b) + 0.1, [])) for n, b in zip(names, bounds))


def for_browser(title: str, facts: str, tokens: Sequence[ScoredToken]) -> str:
    """A self-contained page; hovering over a token shows its score and the likeliest tokens."""
    spans = "".join(_span(token) for token in tokens)
    bounds = ("0", *(f"{bound:g}" for bound in CLASSES_NATS))
    keys = " ".join(f'<span class="s{i}">from {low} nats</span>' for i, low in enumerate(bounds))
    body = f'<p class="dim">{escaped(facts)}</p>\n<p class="text">{keys}</p>\n'
    return page(title, f'{body}<div class="text">{spans}</div>', _STYLE)


def _span(token: ScoredToken) -> str:
    if token.nats is None:
        return f'<span class="first" title="the first token">{escaped(token.text)}</span>'
    likely = [f"{text!r} {nats:.3f}" for text, nats in token.alternatives]
    title = escaped("\n".join([f"{token.nats:.3f} nats", *likely]))
    kind = surprise_class(token.nats)
    return f'<span class="s{kind}" title="{title}">{escaped(token.text)}</span>'
