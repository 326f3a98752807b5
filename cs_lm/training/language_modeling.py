"""The task of a language model: predict the next token of a text."""

import functools
import logging
import shlex
from typing import Any

import torch
from torch import Tensor, nn

from cs_lm.config.run import RunConfig
from cs_lm.data.batches import Batch, BatchSource
from cs_lm.data.pipeline import PreparedData
from cs_lm.data.prefetch import steps_ahead
from cs_lm.data.token_store import Tokens
from cs_lm.device import resolve_device
from cs_lm.distributed.data_parallel import DataParallel
from cs_lm.distributed.grid import Grid, grid_of
from cs_lm.distributed.model_parallel import ModelParallel
from cs_lm.distributed.ranks import ALONE, Ranks
from cs_lm.distributed.sharded_moments import ShardedMoments
from cs_lm.distributed.sharing import Sharing
from cs_lm.errors import UserError
from cs_lm.evaluation.perplexity import (
    EvalOptions,
    Evaluation,
    evaluate,
    format_evaluation,
    gzip_bits_per_byte,
    token_byte_lengths,
)
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import NotANumberError
from cs_lm.inference.text import generate_text
from cs_lm.models.base import leave_it, next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.ops.compile import CompileWithFallback
from cs_lm.ops.fused import OPS
from cs_lm.optim.param_groups import adamw_of, names_in_groups
from cs_lm.training.malloc import keep_freed_memory
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.step import under_autocast
from cs_lm.training.task import CheckStop, Task
from cs_lm.training.trainer import Trainer

SAMPLE_TOKENS = 80
_log = logging.getLogger("cs_lm")


def language_model_trainer(
    config: RunConfig,
    data: PreparedData,
    folder: RunFolder,
    checkpoint: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """The trainer of a run.

    checkpoint  content from `RunFolder.read`, to resume
    weights     state dict with the initial weights of a new run
    ranks       the processes that share the run
    Raises: UserError when the checkpoint was trained with another tokenizer.
    """
    task = LanguageModeling(config, data, ranks.device or resolve_device(config.device), ranks)
    return Trainer(config, task, folder, checkpoint, weights, ranks)


def _sharing_of(config: RunConfig, ranks: Ranks, grid: Grid, device: torch.device) -> Sharing:
    if ranks.size == 1:
        return Sharing()
    if config.parallel == "fsdp":
        from cs_lm.distributed.fully_sharded import FullySharded  # takes a second to import

        recompute = config.activation_checkpointing
        sharing = FullySharded(grid.data, device, config.replicas, recompute=recompute)
    else:
        sharing = (ShardedMoments if config.optimizer_sharding else DataParallel)(grid.data)
    if grid.data.size == ranks.size and grid.context is None:
        return sharing
    model = build_model(config.model, device="meta")
    order = names_in_groups(model, config.optim.weight_decay)
    return ModelParallel(sharing, ranks, grid, config.model.num_layers, order)


class LanguageModeling(Task):
    """Trains the model of the config on the text."""

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.config, self.data = config, data
        sizes = config.tensor_parallel, config.context_parallel, config.pipeline_parallel
        grid = grid_of(ranks, *sizes)
        self._rows, world = grid.rows, grid.rows.world(device)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.sharing = _sharing_of(config, ranks, grid, world.device)
        self.model = build_model(
            config.model,
            OPS[config.ops],
            generator=torch.Generator().manual_seed(config.seed),
            device=world.device,
            activation_checkpointing=config.activation_checkpointing and config.parallel != "fsdp",
            finish_layer=self.sharing.finish_layer if ranks.size > 1 else leave_it,
        )
        self.sharing.take_model(self.model)
        self.model.first_row = world.share_of(config.batch_size).start
        self.optimizer = adamw_of(self.model, config.optim)
        self.sharing.take(self.optimizer)
        self.num_steps = config.num_steps(len(data.train))
        self.tokens_per_step = config.tokens_per_step
        self.flops_per_token = flops_per_token(config.model, config.seq_length)
        self.measure = {
            **data.measured_on,
            "seq_length": config.seq_length,
            "eval_tokens": config.eval_tokens,
        }
        self.batches = BatchSource(
            data.train,
            config.batch_size,
            config.seq_length,
            config.seed,
            config.data.sampling,
            world,
        )
        self._ahead = steps_ahead(self.batches, config.grad_accum)
        loss = next_token_loss
        if config.compile:
            warn_once = functools.cache(_log.warning)
            loss = CompileWithFallback(next_token_loss, warn_once)
            self.optimizer.compile(warn_once)
        self._loss = under_autocast(loss, world.device, config.dtype)
        eval_loss = under_autocast(next_token_loss, world.device, config.dtype)
        self._eval_loss = self.sharing.of_whole_rows(eval_loss)
        self._byte_lengths = token_byte_lengths(data.tokenizer.vocab)

    def batches_of_step(self, step: int) -> list[Batch]:
        return [Batch(*self.sharing.part_of_batch(*batch)) for batch in self._ahead(step)]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._loss(model, batch)

    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        found = self._evaluate(self.data.valid, check_stop).record()
        if self.config.eval_train:
            found["train_loss_nats"] = self._evaluate(self.data.train, check_stop).loss_nats
        return found

    def _evaluate(self, tokens: Tokens, check_stop: CheckStop) -> Evaluation:
        config = self.config
        options = EvalOptions(config.seq_length, config.batch_size, config.eval_tokens)
        lengths = self._byte_lengths
        return evaluate(
            self.model, tokens, lengths, options, self._eval_loss, check_stop, self._rows
        )

    def summary(self, found: dict[str, Any]) -> dict[str, Any]:
        return {"bits_per_byte": found["bits_per_byte"]}

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        on_training = ""
        if "train_loss_nats" in found:
            on_training = f" | training text {found['train_loss_nats']:.4f}"
        return (
            f"validation loss {found['loss_nats']:.4f} | perplexity {found['perplexity']:.2f} | "
            f"{found['bits_per_byte']:.4f} bits/byte{on_training}"
        )

    def sample(self, check_stop: CheckStop) -> tuple[dict[str, Any] | None, str]:
        prompt = self.config.prompt
        choice = DecodingConfig(max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed)
        try:
            [text] = generate_text(
                self.model, self.data.tokenizer, [prompt], choice, lambda *_: check_stop()
            )
        except NotANumberError as error:  # the weights are finite, the logits are not
            return None, str(error)
        return {"prompt": prompt, "text": text}, prompt + text

    def save(self) -> dict[str, Any]:
        return {"tokenizer_fingerprint": self.data.tokenizer.fingerprint}

    def load(self, extras: dict[str, Any]) -> None:
        if extras["tokenizer_fingerprint"] != self.data.tokenizer.fingerprint:
            raise UserError(
                "--resume: the run was trained with another tokenizer than the one given now; use "
                "that one, or start a new run in another --out_dir"
            )

    def start(self, folder: RunFolder) -> None:
        folder.save_tokenizer(self.data.tokenizer)

    def facts(self) -> dict[str, Any]:
        return {
            "train_tokens": len(self.data.train),
            "valid_tokens": len(self.data.valid),
            "num_parameters": num_parameters(self.config.model),
            "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
        }

    def describe_batches(self, step: int) -> list[dict[str, Any]]:
        first = step * self.config.grad_accum
        return [
            {"number": number, "window_starts": self.batches.starts(number).tolist()}
            for number in range(first, first + self.config.grad_accum)
        ]

    def closing_lines(self, found: dict[str, Any] | None) -> list[str]:
        if found is None:
            return []
        config = self.config
        gzip = gzip_bits_per_byte(
            self.data.valid, self.data.tokenizer.vocab, config.seq_length, config.eval_tokens
        )
        return [format_evaluation(found, gzip)]

    def next_command(self, out_dir: str) -> str:
        where, prompt = shlex.quote(out_dir), shlex.quote(self.config.prompt)
        return f"more text: python -m cs_lm generate --out_dir {where} --prompt {prompt}"
