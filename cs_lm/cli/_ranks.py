"""The processes that `torchrun` started for one run: joining them, what they print and check."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

import torch

from cs_lm.config.fields import flat, to_json
from cs_lm.config.run import RunConfig
from cs_lm.data.pipes import with_pipes_kept
from cs_lm.device import resolve_device
from cs_lm.distributed.launch import launched
from cs_lm.distributed.ranks import ALONE, Ranks, join
from cs_lm.errors import Problem, UserError
from cs_lm.tokenizer.corpus_files import is_pipe
from cs_lm.training.console import log_to, print_line


def log_of_rank(file: TextIO) -> AbstractContextManager[None]:
    """Messages go to the file; of the ranks besides rank 0, only errors, on the error stream."""
    place = launched()
    if place is None or place.rank == 0:
        return log_to(lambda text: print_line(text, file))
    return log_to(lambda text: print_line(f"rank {place.rank}: {text}", sys.stderr), logging.ERROR)


@contextmanager
def joined(config: RunConfig) -> Iterator[Ranks]:
    """The processes of a run; this one alone without --parallel.

    Raises: UserError if --parallel does not fit how this process was started.
    """
    place = launched()
    if config.parallel == "none":
        if place is not None and place.size > 1:
            what = f"is missing, but torchrun started {place.size} processes"
            raise UserError(Problem("--parallel", what, fix="add --parallel ddp"))
        yield ALONE
        return
    device = resolve_device(config.device)
    if device.type == "cuda" and place is not None:
        device = torch.device("cuda", place.local_rank)
    ranks = join(device, config.dist_timeout_s)
    try:
        yield ranks
    except UserError:
        ranks.leave()  # an abrupt end of its threads can abort the process
        raise
    ranks.leave()


def kept_for_ranks(config: RunConfig) -> RunConfig:
    """The config with files in place of pipes. Raises: UserError if several processes have one."""
    place = launched()
    for name in ("corpus_path", "valid_path"):
        if place is not None and place.size > 1 and any(map(is_pipe, getattr(config.data, name))):
            what = f"is a pipe, which {place.size} processes cannot read"
            fix = "save the text to a file, and name the file"
            raise UserError(Problem(f"--{name}", what, fix=fix))
    return with_pipes_kept(config)


def check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raises: UserError if the ranks have different settings, or more ranks than rows."""
    counts = config.tensor_parallel, config.context_parallel, config.pipeline_parallel
    of_a_row = math.prod(counts)
    if ranks.size % of_a_row:
        what = f"got {' x '.join(map(str, counts))}"
        need = f"a product that divides {ranks.size}, the number of processes"
        where = "--tensor_parallel, --context_parallel, --pipeline_parallel"
        fix = f"lower one of them, or start {of_a_row} processes"
        raise UserError(Problem(where, what, need, fix))
    share_rows = ranks.size // of_a_row
    if share_rows > config.batch_size:
        what = f"got {config.batch_size}, which {share_rows} processes share"
        need = f"at least {share_rows}"
        raise UserError(Problem("--batch_size", what, need, "raise it, or start fewer processes"))
    if ranks.size % config.replicas:
        what = f"got {config.replicas}, which does not divide {ranks.size} processes"
        raise UserError(Problem("--replicas", what, fix="lower it, or start more processes"))
    settings = [flat(json.loads(text)) for text in ranks.texts(json.dumps(to_json(config)))]
    for rank, own in enumerate(settings):
        for name, value in settings[0].items():
            if own.get(name) != value:
                what = f"got {value!r} at rank 0 and {own.get(name)!r} at rank {rank}"
                fix = "start all processes with the same command"
                raise UserError(Problem(f"--parallel, {name}", what, "the same everywhere", fix))
