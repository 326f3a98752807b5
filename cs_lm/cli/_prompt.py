"""Prompts typed on a terminal: history, several lines, commands that change a setting, colours."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from cs_lm.cli._errors import print_error
from cs_lm.config.fields import is_unicode, not_unicode, replace, settings_of, validate_all
from cs_lm.config.flags import FlagParser, add_flags, config_from_flags
from cs_lm.errors import Problem, UserError
from cs_lm.training.signals import StopRequested, raise_on_signal

HELP = """\
type a prompt and press Enter; Ctrl-C stops an answer, an empty line quits
\"\"\"                begins and ends a prompt of several lines
/temperature 0.5   changes a setting; /temperature alone shows it
/settings          shows all settings
/help              shows this
/quit              quits"""
_BLOCK = '"""'
HISTORY_FILE = Path("~/.cs_lm_history")
_HISTORY_LINES = 1000


def has_colours(stream: TextIO) -> bool:
    """Whether it is a terminal, and neither NO_COLOR (no-color.org) nor TERM=dumb forbids them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, stream: TextIO | None = None) -> str:
    """The text in a colour (an SGR code such as "2", dim), where the stream has colours."""
    return f"\033[{code}m{text}\033[0m" if text and has_colours(stream or sys.stdout) else text


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys find earlier lines, also of earlier sessions, where Python has `readline`."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = HISTORY_FILE.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


class PromptSession:
    """Asks for prompts, one after another, and keeps the settings that commands change.

    settings  a config; `/name value` changes a field of it
    actions   further commands: what `/name` does
    """

    def __init__(self, settings: Any, actions: Mapping[str, Callable[[], None]] | None = None):
        self._help = HELP
        self.settings, self._actions = settings, actions or {}

    def prompts(self) -> Iterator[str]:
        """The prompts, until an empty line, `/quit` or the end of the input."""
        while (line := self._ask("> ")) not in (None, "", "/quit", "/exit"):
            try:
                if line.startswith("/"):
                    self._command(line[1:])
                elif line.startswith(_BLOCK):
                    prompt = self._block(line.removeprefix(_BLOCK))
                    if prompt:
                        yield prompt
                else:
                    yield line
            except UserError as error:
                print_error(error)

    def converse(
        self,
        answer: Callable[[str, Any], None],
        further_help: str = "",
        fatal: tuple[type[UserError], ...] = (),
    ) -> None:
        """Answers prompts until the user ends it. Ctrl-C ends one answer only.

        answer  called with a prompt and the settings; what it raises is shown, but for `fatal`
        """
        self._help += further_help
        print(self._help, file=sys.stderr)
        with line_history():
            for prompt in self.prompts():
                try:
                    with raise_on_signal():
                        answer(prompt, self.settings)
                except fatal:
                    raise
                except UserError as error:  # such as a stop token that the model does not have
                    print_error(error)
                except StopRequested as stopped:
                    if stopped.number != signal.SIGINT:
                        raise
                    print()

    def _ask(self, prompt: str) -> str | None:
        """A line; None at the end of the input."""
        while True:
            try:
                line = input(prompt)
            except EOFError:
                return None
            except UnicodeDecodeError as error:
                problem = f"prompt: is not UTF-8 at byte offset {error.start}; once more"
                print_error(UserError(problem))
                continue
            if is_unicode(line):
                return line
            print_error(UserError(not_unicode("prompt", line)))

    def _block(self, first: str) -> str:
        lines, line = [], first
        while not line.rstrip().endswith(_BLOCK):
            lines.append(line)
            following = self._ask("... ")
            if following is None:
                break
            line = following
        else:
            lines.append(line.rstrip().removesuffix(_BLOCK))
        return "\n".join(lines).strip("\n")

    def _command(self, line: str) -> None:
        name, *values = line.split(maxsplit=1) or ["help"]
        if name in ("help", "?"):
            print(self._help, file=sys.stderr)
        elif name in self._actions:
            self._actions[name]()
        elif name == "settings":
            for each in settings_of(type(self.settings)):
                self._show(each)
        elif name not in settings_of(type(self.settings)):
            raise UserError(Problem(f"/{name}", "unknown command", fix="see /help"))
        elif values:
            self._change(name, values[0])
            self._show(name)
        else:
            self._show(name)

    def _change(self, name: str, value: str) -> None:
        """Does what the flag of that name does; `none` turns a setting off that can be off."""
        kind = type(self.settings)
        default = getattr(kind(), name)
        if value == "none" and (default is None or default == ()):
            changed = replace(self.settings, {name: default})
            if problems := validate_all(changed):
                raise UserError(*problems)
            self.settings = changed
            return
        parser = FlagParser(prog=f"/{name}", description="")
        add_flags(parser, kind)
        values = value.split() if isinstance(default, tuple) else [value]
        self.settings = config_from_flags(
            self.settings, parser.parse_strictly([f"--{name}", *values])
        )

    def _show(self, name: str) -> None:
        value = getattr(self.settings, name)
        shown = "none" if value is None or value == () else value
        shown = " ".join(shown) if isinstance(shown, tuple) else shown
        print(paint(f"/{name} {shown}", "2", sys.stderr), file=sys.stderr)
