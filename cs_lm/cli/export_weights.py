"""`python -m cs_lm export-weights`: writes a run's model in the layout of other programs.

GPT-2 models are for transformers' GPT2LMHeadModel or OpenAI's TensorFlow code; transformer models
are for transformers' LlamaForCausalLM. The tokenizer is written, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import checkpoint_setting, validate_checkpoint
from cs_lm.errors import Problem, missing
from cs_lm.interop.export_weights import FORMATS, write_weights
from cs_lm.training.run_dir import RunFolder, load_trained


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = setting("", "folder of the run; required")
    checkpoint: str = checkpoint_setting()
    target: str = setting("", "folder to make; required", flag="--to")
    file_format: str = setting(
        "safetensors", "file format of the weights", flag="--format", choices=FORMATS
    )
    shard_mb: int | None = setting(
        None,
        "split the weights into files of at most this size; a larger tensor gets its own file",
        "MB",
    )

    def validate(self) -> list[Problem]:
        found = missing({"--out_dir": self.out_dir, "--to": self.target})
        if self.shard_mb is not None and self.shard_mb < 1:
            found.append(Problem("--shard_mb", f"got {self.shard_mb}", "1 or more"))
        if self.shard_mb is not None and self.file_format == "tensorflow":
            found.append(
                Problem("--shard_mb", "has no effect with --format tensorflow", fix="leave it out")
            )
        return found + validate_checkpoint(self.checkpoint)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ExportConfig, "python -m cs_lm export-weights", __doc__, argv)
    trained = load_trained(RunFolder(config.out_dir), config.checkpoint, torch.device("cpu"))
    shard_bytes = None if config.shard_mb is None else config.shard_mb * 1_000_000
    write_weights(trained.model, trained.tokenizer, config.target, config.file_format, shard_bytes)
    print(f"wrote the model of step {trained.iteration} to {config.target}")
    return 0
