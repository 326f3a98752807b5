"""Processes for the tests of several ranks. They start once, and run many functions."""

import importlib
import os
import random
import socket
import traceback
from contextlib import contextmanager, suppress

import torch
import torch.multiprocessing as mp

from cs_lm.distributed.ranks import join

TIMEOUT_S = 60.0


def free_port() -> int:
    """A port that the system does not give to another program before a rank listens on it.

    It gives ports from 32768 (or from 49152) to connections, so these are below.
    """
    order = random.SystemRandom()  # not the test's seed: two tests may run at once
    for _ in range(100):
        port = order.randrange(10_000, 32_768)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def launch_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _serve(rank: int, size: int, port: int, pipe) -> None:
    os.environ.update(launch_variables(rank, size, port))
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"), TIMEOUT_S)
    while (job := pipe.recv()) is not None:
        module, name, arguments = job
        try:
            result = getattr(importlib.import_module(module), name)(ranks, *arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    ranks.leave()


class RankPool:
    """`size` processes that are joined with gloo."""

    def __init__(self, size: int):
        self.size = size
        context, port = mp.get_context("spawn"), free_port()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, *arguments):
        """`function(ranks, *arguments)` in every process: the results, in the order of ranks.

        The function stands at the top of a module; tensors of the results are copied.
        """
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        answers = [self._answer(pipe) for pipe in self._pipes]
        wrong = [text for is_fine, text in answers if not is_fine]
        assert not wrong, "\n".join(wrong)
        return [result for _, result in answers]

    def _answer(self, pipe):
        assert pipe.poll(TIMEOUT_S), "a rank does not answer"
        return pipe.recv()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(2)
            process.kill()


@contextmanager
def rank_pool(size: int):
    pool = RankPool(size)
    try:
        yield pool
    finally:
        pool.close()
