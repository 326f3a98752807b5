"""`python -m cs_lm import-weights`: turns pretrained weights into a run at step 0.

Reads a folder from Hugging Face (GPT-2, Llama) or OpenAI (GPT-2), a weight file in one, or
nanoGPT's ckpt.pt (its GELU has no tanh; it differs from ours by up to 5e-4). The run can generate
text and be evaluated, and `run_clm.py --resume` trains it further.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import readable_errors
from cs_lm.config.data import DataConfig
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import RunConfig
from cs_lm.errors import Problem, UserError, missing
from cs_lm.training.run_dir import RunFolder


@dataclass(frozen=True)
class ImportConfig:
    weights_path: str = setting("", "folder or file to read; required", flag="--from")
    out_dir: str = setting("", "folder of the run that comes out; required")
    vocab_path: str | None = setting(None, "tokenizer's vocab.json; default: beside the weights")
    merges_path: str | None = setting(None, "tokenizer's merges.txt, beside --vocab_path")

    def validate(self) -> list[Problem]:
        found = missing({"--from": self.weights_path, "--out_dir": self.out_dir})
        if self.weights_path and not Path(self.weights_path).exists():
            found.append(
                Problem("--from", f"got {self.weights_path!r}, which is not a file or folder")
            )
        if (self.vocab_path is None) != (self.merges_path is None):
            found.append(
                Problem(
                    "--vocab_path, --merges_path", "got one of the two", fix="give both or none"
                )
            )
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    asked = parse_config(ImportConfig, "python -m cs_lm import-weights", __doc__, argv)
    from cs_lm.config.presets import nearest_model_name
    from cs_lm.interop.import_weights import folder_of, read_weights
    from cs_lm.interop.layouts import read_config
    from cs_lm.interop.sources import nanogpt_file
    from cs_lm.interop.tokenizers import read_tokenizer
    from cs_lm.models.stats import num_parameters
    from cs_lm.tokenizer import BPETokenizer

    folder = RunFolder(asked.out_dir)
    folder.refuse_a_run()
    path = Path(asked.weights_path)
    if nanogpt_file(path) is None:
        read_config(folder_of(path))  # raises early if this is no folder of weights
    if asked.vocab_path is not None:
        specials = DataConfig.special_tokens
        tokenizer = BPETokenizer.from_files(asked.vocab_path, asked.merges_path, specials)
    else:
        tokenizer = read_tokenizer(folder_of(path))
    model = read_weights(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"--vocab_path: the tokenizer has {tokenizer.vocab_size} tokens, but the weights are "
            f"for {model.config.vocab_size}"
        )
    config = RunConfig(
        model_name=nearest_model_name(model.config),
        model=model.config,
        data=DataConfig(special_tokens=tuple(tokenizer.special_tokens)),
        seq_length=min(RunConfig.seq_length, model.config.context_length),
        out_dir=asked.out_dir,
    )
    with folder.lock():
        folder.refuse_a_run()
        folder.create_from_pretrained(config, model, tokenizer)
    shown = shlex.quote(str(folder.path))
    print(
        f"imported {num_parameters(model.config) / 1e6:.2f} M parameters to {folder.path}\n"
        f'text: python -m cs_lm generate --out_dir {shown} --prompt "The "\n'
        f"training: python run_clm.py --resume --out_dir {shown} --corpus_path TEXT"
    )
    return 0
