"""The frame of a self-contained HTML page: light and dark, narrow and wide, no network."""

import html

_STYLE = """\
:root { color-scheme: light dark; --ink: #1c1d21; --dim: #63666f; --paper: #ffffff;
  --panel: #f4f5f7; --line: #d9dbe0; --accent: #2457c5; --second: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e8ec; --dim: #9da1ac; --paper: #16171a; --panel: #212327; --line: #383b42;
    --accent: #82a8ff; --second: #ff9d66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.dim { color: var(--dim); }
pre, code, .text { font-family: ui-monospace, monospace; font-size: .9rem; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  padding: .75rem; border-radius: 6px; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """The whole page. `body`, `style` and `script` are code; the title is text."""
    closing = f"<script>\n{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="generator" content="cs_lm">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n{body}\n{closing}</body>\n</html>\n"
    )


def escaped(text: object) -> str:
    """Text as HTML; also safe inside a quoted attribute."""
    return html.escape(str(text))
