"""The folder of a run: its files, its tokenizer, and its trained model."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cs_lm.config.fields import from_json, to_json, validate_all
from cs_lm.config.run import MAX_CONTEXT_LENGTH, RunConfig
from cs_lm.errors import Problem, UserError
from cs_lm.models.base import LanguageModel, cast_weights
from cs_lm.models.registry import build_model
from cs_lm.models.stats import num_parameters, num_scalar_parameters
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.storage.atomic import atomic_write
from cs_lm.storage.json_file import read_json
from cs_lm.storage.lock import locked
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import checkpoint_content, restore
from cs_lm.training.checkpoint_manager import KINDS, CheckpointManager, Found
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.sharded_checkpoint import StoredTensor

_END_TOKENS = "end_tokens.json"
_log = logging.getLogger("cs_lm")


class RunFolder:
    """The folder of a run: metrics.jsonl, loss.png, checkpoints/, tokenizer/, tensorboard/.

    flag  what the user named it with, for messages
    """

    def __init__(self, path: str | Path, flag: str = "--out_dir"):
        self.path, self.flag = Path(path), flag
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.plot_of("loss", "step")
        self.checkpoints = CheckpointManager(self.path / "checkpoints")
        self._tokenizer = self.path / "tokenizer"

    def plot_of(self, shown: str, against: str) -> Path:
        """Path of a plot: `loss.png`, or `perplexity-tokens.png` if the axis is not steps."""
        return self.path / f"{shown}{'' if against == 'step' else f'-{against}'}.png"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While entered, no other process can train in this folder.

        Raises: UserError when another process does.
        """
        with locked(self.path / "lock") as is_ours:
            if not is_ours:
                raise UserError(
                    f"{self.flag}: another process is training in {str(self.path)!r}; wait for it "
                    "or stop it, or name another folder"
                )
            yield

    def exists(self) -> bool:
        """Whether there is a checkpoint. Without one, the run has no work to lose."""
        return any(self.checkpoints.steps(kind) for kind in KINDS)

    def refuse_a_run(self) -> None:
        """Raises: UserError when the folder has a checkpoint, so that no work is overwritten."""
        if self.exists():
            raise UserError(
                f"{self.flag}: {str(self.path)!r} holds a run already; add --resume to continue "
                "it, or name another folder"
            )

    def require(self, fix: str = "name the folder of a run that has saved one") -> None:
        """Raises: FileNotFoundError when the folder has no checkpoint."""
        if not self.exists():
            raise FileNotFoundError(f"{self.flag}: {str(self.path)!r} holds no checkpoint; {fix}")

    def require_log(self) -> None:
        """Raises: UserError where there is no log, or an empty one."""
        if next(MetricsLog(self.metrics).records(warn=False), None) is None:
            why = "has an empty log" if self.metrics.exists() else "is not the folder of a run"
            raise UserError(f"{self.flag}: {str(self.path)!r} {why}; name the folder of a run")

    def save_tokenizer(self, tokenizer: BPETokenizer) -> None:
        """Saves a copy of the tokenizer, so that the folder alone is enough to generate text."""
        tokenizer.save(self._tokenizer / "vocab.json", self._tokenizer / "merges.txt")
        for name, tokens in (
            ("special_tokens.json", tokenizer.special_tokens),
            (_END_TOKENS, tokenizer.end_tokens),
        ):
            content = json.dumps(tokens, ensure_ascii=False).encode("utf-8")
            atomic_write(self._tokenizer / name, content)

    def load_tokenizer(self) -> BPETokenizer:
        """The run's tokenizer. Raises: FileNotFoundError or UserError saying what to do."""
        if not self.exists() and not self._tokenizer.is_dir():
            raise FileNotFoundError(
                f"{self.flag}: {str(self.path)!r} is not the folder of a run; name one that is"
            )
        try:
            return self._read_tokenizer()
        except (ValueError, OSError) as error:
            # leave out a Problem's flag and fix: they ask for other files, which a run cannot use
            problems = error.args if isinstance(error, UserError) else (error,)
            found = "; ".join(getattr(each, "what", str(each)) for each in problems)
            raise UserError(
                f"run: its tokenizer is damaged ({found}); restore {str(self._tokenizer)!r} from a "
                "copy"
            ) from None

    def _read_tokenizer(self) -> BPETokenizer:
        specials = _read_texts(self._tokenizer / "special_tokens.json")
        tokenizer = BPETokenizer.from_files(
            self._tokenizer / "vocab.json", self._tokenizer / "merges.txt", specials
        )
        if (self._tokenizer / _END_TOKENS).exists():  # earlier versions did not write it
            tokenizer.end_tokens = _read_texts(self._tokenizer / _END_TOKENS)
        return tokenizer

    def create_from_pretrained(
        self, config: RunConfig, model: LanguageModel, tokenizer: BPETokenizer
    ) -> None:
        """Writes a run at step 0 from a model that another program trained."""
        self.save_tokenizer(tokenizer)
        log = MetricsLog(self.metrics)
        log.clear()
        log.write("import", step=0, num_parameters=num_parameters(config.model))
        optimizer = AdamW(parameter_groups(model, config.optim.weight_decay))
        content = checkpoint_content(
            model,
            optimizer,
            0,
            config=to_json(config),
            trained_tokens=0,
            elapsed_s=0.0,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        self.checkpoints.save(content)

    def read(self, which: str, lazily: bool = False) -> dict[str, Any]:
        """The content of a checkpoint.

        which  "last": the newest that verifies; "best"; or the number of a step
        Raises: FileNotFoundError or UserError when there is none. A step has no fallback.
        """
        return self.find(which, lazily).content

    def find(self, which: str, lazily: bool = False) -> Found:
        """As `read`, with the step and the kind of what it has found."""
        self.require()
        if which == "last":
            found = self.checkpoints.find_newest(lazily=lazily)
        elif which == "best":
            if not self.checkpoints.steps("best"):
                _log.info(
                    "there is no best checkpoint before the first validation; using the last one"
                )
                return self.find("last")
            try:
                found = self.checkpoints.find_newest(["best"])
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{error}; or try --checkpoint last") from None
        else:
            step = int(which)
            is_only_best = step in set(self.checkpoints.steps("best")) - {*self.checkpoints.steps()}
            kind = "best" if is_only_best else "step"
            found = Found(step, kind, self.checkpoints.read(step, kind, lazily))
        _check_extras(found.content["extras"])
        return found

    def ends(self) -> list[int]:
        """The steps of the "end" records in the log: there the run was complete."""
        records = MetricsLog(self.metrics).records(warn=False)
        return [record["step"] for record in records if record["kind"] == "end"]

    def verify(self) -> list[str]:
        """Reads the whole run; returns a line for each damaged file.

        Raises: FileNotFoundError when there is no checkpoint.
        """
        self.require()
        wrong: list[str] = []
        tokenizer = None
        try:
            tokenizer = self.load_tokenizer()
        except (ValueError, OSError) as error:
            wrong.append(str(error))
        for kind in KINDS:
            for step in self.checkpoints.steps(kind):
                try:
                    content = self.checkpoints.read(step, kind)
                    _check_extras(content["extras"])
                    if tokenizer is not None:
                        self.check_tokenizer(content, tokenizer)
                except (ValueError, OSError) as error:
                    wrong.append(str(error))
        log = MetricsLog(self.metrics)
        damaged = log.damaged_lines()
        wrong += [f"line {n} of {str(self.metrics)!r}: it is damaged" for n in damaged]
        if not list(log.records(warn=False)):
            wrong.append(f"run: {str(self.metrics)!r} is missing or empty")
        return wrong

    def check_tokenizer(self, content: dict[str, Any], tokenizer: BPETokenizer) -> None:
        """Raises: UserError when the checkpoint was trained with another tokenizer."""
        if content["extras"]["tokenizer_fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"run: the tokenizer in {str(self.path)!r} is not the one that the checkpoint of "
                f"step {content['iteration']} was trained with; restore the folder's tokenizer/"
            )


def _read_texts(path: Path) -> list[str]:
    texts = read_json(path, "run", list)
    if not all(type(one) is str for one in texts):
        raise UserError(Problem("run", f"{str(path)!r} is damaged", "a JSON list of texts"))
    return texts


def _check_extras(extras: dict[str, Any]) -> None:
    for name, kind in (
        ("config", dict),
        ("tokenizer_fingerprint", str),
        ("elapsed_s", float),
        ("trained_tokens", int),
    ):
        if not isinstance(extras.get(name), kind):
            raise UserError(
                f"checkpoint: its {name} is {extras.get(name)!r}; was it written by a training run?"
            )


def stage_of(content: dict[str, Any]) -> str:
    """The command that trained a checkpoint: "train", or a stage of alignment."""
    stage = content["extras"].get("stage")
    return stage["name"] if isinstance(stage, dict) and "name" in stage else "train"


def saved_config(content: dict[str, Any]) -> RunConfig:
    """The settings in a checkpoint, checked: their model has as many weights as the checkpoint.

    Raises: UserError for other settings: such a model could take too much memory.
    """
    config = from_json(RunConfig, content["extras"]["config"])
    weights = content["model"].values()
    tensors = [weight for weight in weights if isinstance(weight, (torch.Tensor, StoredTensor))]
    num_weights = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    problems = validate_all(config)
    if config.model.context_length > MAX_CONTEXT_LENGTH:
        problems.append(Problem("--max_seq_length", f"got {config.model.context_length}"))
    wanted = num_parameters(config.model)
    if stage_of(content) == "reward":
        wanted = num_scalar_parameters(config.model) + 1  # and the offset of the scores
    if not problems and wanted != num_weights:
        what = f"got {num_weights} weights, but settings for {wanted}"
        problems = [Problem("weights", what)]
    if problems:
        raise UserError(f"checkpoint: its settings cannot be those of a run: {problems[0]}")
    return config


class TrainedModel(NamedTuple):
    """The model of a run. template: of conversations, if it was fine-tuned on them."""

    model: LanguageModel
    tokenizer: BPETokenizer
    config: RunConfig
    iteration: int
    template: str | None = None


def load_trained(
    folder: RunFolder,
    which: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> TrainedModel:
    """The model of `RunFolder.read(which)`, ready to generate text, with weights of that dtype.

    Raises: FileNotFoundError, or UserError when model and tokenizer do not belong together.
    """
    tokenizer = folder.load_tokenizer()
    content = folder.read(which)
    folder.check_tokenizer(content, tokenizer)
    if stage_of(content) == "reward":
        raise UserError(
            f"{folder.flag}: {str(folder.path)!r} is a reward model, which gives scores and no "
            "text; name the run that it was trained from, or one of PPO"
        )
    config = saved_config(content)
    # restore() overwrites all weights; a separate generator leaves torch's global one untouched
    model = build_model(config.model, generator=torch.Generator(), device=device)
    restore(content, model)
    cast_weights(model, dtype).eval()
    template = content["extras"].get("template")
    return TrainedModel(model, tokenizer, config, content["iteration"], template)
