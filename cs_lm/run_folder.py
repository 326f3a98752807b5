"""What lies where in a run's folder, and the model in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cs_lm.checkpoint import CheckpointManager, read_checkpoint, restore
from cs_lm.config import RunConfig, from_json
from cs_lm.fast_ops import FAST
from cs_lm.model import TransformerLM
from cs_lm.tokenizer import BPETokenizer
from cs_lm.whole_file import locked


class RunFolder:
    """metrics.jsonl, loss.png, checkpoints/{last,best}.pt, tokenizer/ and tensorboard/ of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = CheckpointManager(self.path / "checkpoints")
        self._tokenizer = self.path / "tokenizer"

    @contextmanager
    def only_here(self) -> Iterator[None]:
        """Keeps other processes from training in the folder while entered.

        Raises: ValueError when one does.
        """
        with locked(self.path / "lock") as is_ours:
            if not is_ours:
                raise ValueError(
                    f"--out_dir: another process is training in {str(self.path)!r}; wait for it or "
                    "stop it, or name another folder"
                )
            yield

    def exists(self) -> bool:
        """Whether there is work to lose; a run that ended before its first checkpoint has none."""
        return self.checkpoints.last_path.is_file() or self.checkpoints.best_path.is_file()

    def require(self) -> None:
        """Raises: FileNotFoundError saying that there is no run here."""
        if not self.exists():
            raise FileNotFoundError(
                f"run: {str(self.path)!r} holds no checkpoint; check --out_dir, or start the run "
                "without --resume"
            )

    def save_tokenizer(self, tokenizer: BPETokenizer) -> None:
        """A copy, so that the folder alone is enough to generate text."""
        tokenizer.save(self._tokenizer / "vocab.json", self._tokenizer / "merges.txt")
        specials = json.dumps(tokenizer.special_tokens, ensure_ascii=False)
        (self._tokenizer / "special_tokens.json").write_text(specials, encoding="utf-8")

    def load_tokenizer(self) -> BPETokenizer:
        specials_path = self._tokenizer / "special_tokens.json"
        if not specials_path.is_file():
            raise FileNotFoundError(
                f"run: {str(self.path)!r} holds no tokenizer; name the folder of a run (--out_dir)"
            )
        try:
            specials = json.loads(specials_path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"run: {str(specials_path)!r} is damaged; need a JSON list") from None
        return BPETokenizer.from_files(
            self._tokenizer / "vocab.json", self._tokenizer / "merges.txt", specials
        )

    def read_last(self) -> dict[str, Any]:
        """The content of the last checkpoint, or of the best one where none was saved yet.

        Raises: FileNotFoundError as `require` does.
        """
        self.require()
        paths = (self.checkpoints.last_path, self.checkpoints.best_path)
        return read_checkpoint(next(path for path in paths if path.is_file()))


class TrainedModel(NamedTuple):
    model: TransformerLM
    tokenizer: BPETokenizer
    config: RunConfig
    iteration: int


def load_trained(
    folder: RunFolder, which: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> TrainedModel:
    """The best or last model of a run, ready to generate, with weights of that dtype.

    Raises: FileNotFoundError, or ValueError when model and tokenizer do not belong together.
    """
    path = folder.checkpoints.last_path if which == "last" else folder.checkpoints.best_path
    tokenizer = folder.load_tokenizer()
    if not path.is_file():
        other = "last" if which == "best" else "best"
        raise FileNotFoundError(
            f"--checkpoint: got {which!r}, but {str(folder.path)!r} holds no {path.name} yet; "
            f"train on with --resume, or try --checkpoint {other}"
        )
    content = read_checkpoint(path)
    if content["extras"]["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"run: the tokenizer in {str(folder.path)!r} is not the one that {path.name} was "
            "trained with; restore the folder's tokenizer/"
        )
    config = from_json(RunConfig, content["extras"]["config"])
    # every weight is overwritten: an explicit generator keeps the global one untouched
    model = TransformerLM(config.model, FAST, torch.Generator(), device=device)
    restore(content, model)
    return TrainedModel(model.cast_weights(dtype).eval(), tokenizer, config, content["iteration"])
