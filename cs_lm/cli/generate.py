"""`python -m cs_lm generate`: a trained model continues a prompt.

The prompt comes from --prompt, --prompt_file or standard input. On a terminal without these flags,
you are asked for one prompt after another.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cs_lm.cli._errors import print_error, readable_errors
from cs_lm.config.fields import is_unicode, not_unicode, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import DTYPES
from cs_lm.config.shared import checkpoint_setting, device_setting, validate_checkpoint
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import NotANumberError
from cs_lm.inference.text import generate_text, stop_ids_of
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained
from cs_lm.training.signals import StopRequested, raise_on_signal


@dataclass(frozen=True)
class GenerateConfig:
    out_dir: str = setting("", "folder of the run; required")
    checkpoint: str = checkpoint_setting()
    prompt: str | None = setting(None, "text to go on from")
    prompt_file: str | None = setting(None, "file with the text to go on from")
    device: str = device_setting()
    dtype: str = setting(
        "float32", "of the weights; bfloat16 is quicker and less exact", choices=DTYPES
    )
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def validate(self) -> list[Problem]:
        found = (
            []
            if self.out_dir
            else [Problem("--out_dir", "is missing", fix="name the folder of a run")]
        )
        if self.prompt is not None and self.prompt_file is not None:
            found.append(Problem("--prompt, --prompt_file", "got both", fix="give one of the two"))
        if self.prompt == "":
            found.append(Problem("--prompt", "got an empty text", "at least one character"))
        if self.prompt is not None and not is_unicode(self.prompt):
            found.append(not_unicode("--prompt", self.prompt))
        if self.prompt_file is not None and not Path(self.prompt_file).is_file():
            found.append(Problem("--prompt_file", f"got {self.prompt_file!r}, which is not a file"))
        return found + validate_checkpoint(self.checkpoint) + self.decoding.validate()


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(GenerateConfig, "python -m cs_lm generate", __doc__, argv)
    device = resolve_device(config.device)
    folder = RunFolder(config.out_dir)
    prompt = config.prompt
    if config.prompt_file is not None:
        prompt = _decoded("--prompt_file", Path(config.prompt_file).read_bytes())
    elif prompt is None and not sys.stdin.isatty():
        prompt = _decoded("standard input", sys.stdin.buffer.read())
    if prompt == "":
        raise UserError("prompt: got an empty text, need at least one character")
    trained = load_trained(folder, config.checkpoint, device, getattr(torch, config.dtype))
    stop_ids_of(trained.tokenizer, config.decoding.stop_token)  # raises before any text is shown
    try:
        return _answer(trained, prompt, config.decoding)
    except NotANumberError as error:
        raise UserError(
            f"--checkpoint: got {config.checkpoint}, step {trained.iteration} in "
            f"{config.out_dir!r}: {error}; try another one"
        ) from None


def _answer(trained: TrainedModel, prompt: str | None, decoding: DecodingConfig) -> int:
    if prompt is not None:
        _write(trained, prompt, decoding)
        return 0
    print(
        "type a prompt and press Enter; Ctrl-C stops an answer, an empty line quits",
        file=sys.stderr,
    )
    while line := _ask():
        if not is_unicode(line):
            print_error(UserError(not_unicode("prompt", line)))
            continue
        try:
            with raise_on_signal():
                _write(trained, line, decoding)
        except StopRequested as stopped:
            if stopped.number != signal.SIGINT:
                raise
            print()  # Ctrl-C ends this answer only
    return 0


def _decoded(where: str, content: bytes) -> str:
    """The text, without the newline that editors and `echo` put at the end."""
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 at byte offset {error.start}") from None


def _ask() -> str:
    while True:
        try:
            return input("> ")
        except EOFError:
            return ""
        except UnicodeDecodeError as error:
            print_error(UserError(f"prompt: is not UTF-8 at byte offset {error.start}; once more"))


def _write(trained: TrainedModel, prompt: str, decoding: DecodingConfig) -> None:
    """Prints the prompt, then new text as soon as it is final; several samples all at the end."""
    if decoding.num_samples > 1:
        texts = generate_text(trained.model, trained.tokenizer, [prompt], decoding)
        for number, text in enumerate(texts, start=1):
            print(f"---- sample {number} of {len(texts)}\n{prompt}{text}", flush=True)
        return
    print(prompt, end="", flush=True)
    generate_text(
        trained.model,
        trained.tokenizer,
        [prompt],
        decoding,
        show=lambda _row, text: print(text, end="", flush=True),
    )
    print()
