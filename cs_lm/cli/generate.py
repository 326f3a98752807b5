"""`python -m cs_lm generate`: a trained model continues a prompt.

The prompt comes from --prompt, --prompt_file or standard input. On a terminal without these flags,
you are asked for one prompt after another; /temperature 0.5 and its kin change the settings.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cs_lm.cli._errors import decoded, not_empty, readable_errors
from cs_lm.cli._prompt import PromptSession, paint
from cs_lm.config.fields import is_unicode, not_unicode, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import DTYPES
from cs_lm.config.shared import (
    checkpoint_setting,
    device_setting,
    validate_checkpoint,
    validate_run,
)
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import NotANumberError
from cs_lm.inference.text import Completion, allowed_ids, complete, stop_ids_of
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained


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
        found = validate_run(self.out_dir)
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
        where, content = f"--prompt_file: {config.prompt_file!r}", Path(config.prompt_file)
        prompt = _prompt_from(where, content.read_bytes())
    elif prompt is None and not sys.stdin.isatty():
        prompt = _prompt_from("standard input", sys.stdin.buffer.read())
    trained = load_trained(folder, config.checkpoint, device, getattr(torch, config.dtype))
    _check(trained, config.decoding)
    try:
        if prompt is not None:
            _write(trained, prompt, config.decoding)
        else:
            PromptSession(config.decoding).converse(
                lambda prompt, decoding: _write(trained, prompt, decoding),
                fatal=(NotANumberError,),
            )
    except NotANumberError as error:
        raise UserError(
            f"--checkpoint: got {config.checkpoint}, step {trained.iteration} in "
            f"{config.out_dir!r}: {error}; try another one"
        ) from None
    return 0


def _prompt_from(where: str, content: bytes) -> str:
    """The text, without the newline that editors and `echo` put at the end."""
    return not_empty(where, decoded(where, content).removesuffix("\n").removesuffix("\r"))


def _check(trained: TrainedModel, decoding: DecodingConfig) -> None:
    """Raises: UserError for settings that the model cannot follow, before any text is shown."""
    stop_ids = stop_ids_of(trained.tokenizer, decoding.stop_token)
    size = trained.config.model.vocab_size
    allowed_ids(trained.tokenizer, size, decoding.allowed_characters, stop_ids)


def _write(trained: TrainedModel, prompt: str, decoding: DecodingConfig) -> None:
    """Prints the prompt, then new text as soon as it is final; several samples all at the end."""
    if decoding.num_samples > 1:
        found = complete(trained.model, trained.tokenizer, [prompt], decoding)
        for number, completion in enumerate(found, start=1):
            heading = f"---- sample {number} of {len(found)}"
            print(f"{paint(heading, '36')}\n{paint(prompt, '2')}{completion.text}", flush=True)
            _print_logprobs(trained, completion, decoding)
        return
    _check(trained, decoding)
    print(paint(prompt, "2"), end="", flush=True)
    (completion,) = complete(
        trained.model,
        trained.tokenizer,
        [prompt],
        decoding,
        show=lambda _row, text: print(text, end="", flush=True),
    )
    print()
    _print_logprobs(trained, completion, decoding)


def _print_logprobs(
    trained: TrainedModel, completion: Completion, decoding: DecodingConfig
) -> None:
    """One line a token: its log-probability [nats], and the most likely tokens with theirs."""
    if decoding.num_alternatives is None:
        return

    def shown(token_id: int) -> str:
        return json.dumps(trained.tokenizer.vocab[token_id].decode("utf-8", "replace"))

    sample = completion.sample
    for token_id, logprob, others in zip(
        sample.token_ids, sample.logprobs, sample.alternatives, strict=True
    ):
        likely = "  ".join(f"{shown(i)} {p:.3f}" for i, p in others)
        print(f"{logprob:8.3f}  {shown(token_id):<16}{paint(likely, '2')}".rstrip(), flush=True)
