"""What sharing a run among ranks costs: bytes on the wire, memory, time, and what overlap hides.

    python -m benchmarks.scale [--rounds 5] [--only wire memory time overlap resume]

All ranks are processes of this machine that talk by gloo; nothing here is about GPUs.

wire     bytes that each collective gets in an update, counted by wrapping torch.distributed's
         functions, beside the formulas
memory   bytes of weights, gradients and moments that a rank keeps, beside what cs-lm plan says
time     two ranks of one thread beside one process of two threads, in turns
overlap  an update whose collectives take some time longer, with buckets that travel during
         backward, and with one that travels after it
resume   the first batch of a run that goes on at step 1,000,000, beside that of a new run
"""

import argparse
import atexit
import collections
import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.measure import Found, in_turns

SHAPE = {"vocab_size": 2048, "context_length": 256, "d_model": 192, "num_heads": 6,
         "num_layers": 4, "d_ff": 512}  # fmt: skip
BATCH, LENGTH = 16, 256
KINDS = ("ddp", "moments", "fsdp", "hybrid")
# how many ranks share weights, positions, layers
GRIDS = {"tensor": (2, 1, 1), "context": (1, 2, 1), "pipeline": (1, 1, 2),
         "tensor x context": (2, 2, 1)}  # fmt: skip
_WRAPPED = {
    "all_reduce": ("all_reduce",),
    "all_gather": ("all_gather", "all_gather_into_tensor", "all_gather_single"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "broadcast": ("broadcast",),
    "send": ("isend",),
}


class Prepared:
    """A model, shared among ranks, and a batch."""

    def __init__(self, kind: str, ranks: Any, bucket_bytes: int | None = None):
        import torch

        from cs_lm.config.model import ModelConfig
        from cs_lm.config.optim import OptimConfig
        from cs_lm.data.batches import Batch
        from cs_lm.distributed.data_parallel import BUCKET_BYTES, DataParallel
        from cs_lm.distributed.fully_sharded import FullySharded
        from cs_lm.distributed.grid import grid_of
        from cs_lm.distributed.model_parallel import ModelParallel
        from cs_lm.distributed.sharded_moments import ShardedMoments
        from cs_lm.distributed.sharing import Sharing
        from cs_lm.models.registry import build_model
        from cs_lm.optim.param_groups import adamw_of, names_in_groups

        device, bucket_bytes = torch.device("cpu"), bucket_bytes or BUCKET_BYTES
        config, grid = ModelConfig(**SHAPE), grid_of(ranks, *GRIDS.get(kind, ()))
        make = {
            "one": Sharing,
            "ddp": lambda: DataParallel(grid.data, bucket_bytes),
            "moments": lambda: ShardedMoments(ranks, bucket_bytes),
            "fsdp": lambda: FullySharded(ranks, device),
            "hybrid": lambda: FullySharded(ranks, device, replicas=2),
        }
        self.sharing = make["ddp" if kind in GRIDS else kind]()
        if kind in GRIDS:
            order = names_in_groups(build_model(config, device="meta"), OptimConfig().weight_decay)
            self.sharing = ModelParallel(self.sharing, ranks, grid, config.num_layers, order)
        generator = torch.Generator().manual_seed(0)
        self.model = build_model(
            config, generator=generator, finish_layer=self.sharing.finish_layer
        )
        self.sharing.take_model(self.model)
        self.optimizer = adamw_of(self.model, OptimConfig())
        self.sharing.take(self.optimizer)
        self.sharing.begin()
        ids = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH + 1), generator=generator)
        rows = range(BATCH) if ranks is None else grid.rows.world(device).share_of(BATCH)
        ids = ids[rows.start : rows.stop]
        self.batch = Batch(*self.sharing.part_of_batch(ids[:, :-1], ids[:, 1:]))

    def step(self) -> None:
        from cs_lm.training.step import train_step

        train_step(self.model, self.optimizer, [self.batch], 1.0, sharing=self.sharing)


# ---- wire ----


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of float32 payload by collective: of what is summed, and of a gathered whole."""
    import torch.distributed as dist

    counts: dict[str, int] = collections.Counter()
    originals = {}
    for kind, names in _WRAPPED.items():
        for name in names:
            if not hasattr(dist, name):
                continue
            originals[name] = getattr(dist, name)
            wrapped = functools.partial(_counting, counts, kind, originals[name])
            setattr(dist, name, wrapped)
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _counting(counts: dict[str, int], kind: str, original: Callable, *args, **named) -> Any:
    import torch
    import torch.distributed as dist

    tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
    lists = [each for each in args if isinstance(each, list)]
    sizes = [x.nbytes for x in tensors] + [sum(x.nbytes for x in each) for each in lists]
    tensors += [one for each in lists for one in each]
    group = named.get("group") or next((x for x in args if isinstance(x, dist.ProcessGroup)), None)
    # counters and checksums are of other kinds, and a rank alone sends nothing
    if tensors[0].dtype == torch.float32 and dist.get_world_size(group) > 1:
        counts[kind] += max(sizes)
    return original(*args, **named)


def wire(ranks: Any, kind: str) -> dict[str, int]:
    prepared = Prepared(kind, ranks)
    prepared.step()
    with counted() as counts:
        prepared.step()
    return dict(counts)


def wire_formula(kind: str, size: int) -> dict[str, float]:
    """Bytes in an update, with P parameters, of which P_r outside the layers."""
    from cs_lm.config.model import ModelConfig
    from cs_lm.models.stats import num_parameters

    total = 4 * num_parameters(ModelConfig(**SHAPE))
    root = 4 * (2 * SHAPE["vocab_size"] * SHAPE["d_model"] + SHAPE["d_model"])
    if kind in GRIDS:
        return grid_formula(total, *GRIDS[kind])
    if kind == "ddp":
        return {"all_reduce": total}
    if kind == "moments":
        return {"all_reduce": total, "all_gather": total}
    # layers are gathered for forward and again for backward; the root stays from one to the other
    found = {"all_gather": 2 * (total - root) + root, "reduce_scatter": total}
    if kind == "hybrid":
        found["all_reduce"] = total / (size / 2)  # the parts, between two replicas
    return found


def grid_formula(total: int, tensor: int, context: int, stages: int) -> dict[str, float]:
    """The same at rank 0 of ranks that share a model.

    total  bytes of the parameters. A tensor-parallel rank has 1 / N of what is cut, and the
           2 L + 1 norms and the embedding as a whole
    """
    width, layers = SHAPE["d_model"], SHAPE["num_layers"]
    positions = BATCH * LENGTH // context  # that a team computes
    activations = 4 * positions * width
    if stages > 1:  # rank 0 sends what its layers give, forward only
        return {"send": activations}
    whole = 4 * (SHAPE["vocab_size"] + 2 * layers + 1) * width
    moved = summed = 0.0
    if tensor > 1:
        # each layer gathers before attention and feed-forward and adds up behind them, and
        # backward does it the other way; so does the last norm. The loss sums 3 numbers a position
        moved += (4 * layers + 1) * activations
        summed += 12 * positions + whole
    if context > 1:
        # keys and values of the own heads, of all positions
        moved += 2 * layers * activations * context / tensor
        summed += (total - whole) / tensor + whole
    return {"all_gather": moved, "reduce_scatter": moved, "all_reduce": summed}


def show_wire(pools: Any) -> None:
    sizes = {kind: (4,) if kind == "hybrid" else (2, 3) for kind in KINDS}
    sizes |= {kind: (math.prod(grid),) for kind, grid in GRIDS.items()}
    for kind, size in ((kind, size) for kind, own in sizes.items() for size in own):
        found, *_ = pools(size).run(wire, kind)
        formula = wire_formula(kind, size)
        ratios = {k: round(found.get(k, 0) / formula[k], 4) for k in formula}
        print(json.dumps({"question": "bytes in an update / formula", "kind": kind,
                          "ranks": size, "bytes": found, "ratio": ratios}))  # fmt: skip


# ---- memory ----


def kept(ranks: Any, kind: str) -> int:
    """Bytes of weights, gradients and moments between two updates."""
    prepared = Prepared(kind, ranks)
    prepared.step()
    weights = prepared.sharing.parameters()
    tensors = [*weights.values(), *(p.grad for p in weights.values() if p.grad is not None)]
    for state in prepared.optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    return sum(tensor.nbytes for tensor in tensors)


def show_memory(pools: Any) -> None:
    from cs_lm.config.model import ModelConfig
    from cs_lm.models.stats import num_parameters
    from cs_lm.scaling.meshes import FLOAT32, Mesh, state_bytes

    total = num_parameters(ModelConfig(**SHAPE))
    for kind in KINDS:
        for size in (4,) if kind == "hybrid" else (2, 3):
            replicas, sharding = (2, "fsdp") if kind == "hybrid" else (1, kind)
            mesh = Mesh(size // replicas, sharding=sharding)
            formula = sum(state_bytes(total, mesh, FLOAT32))
            found = pools(size).run(kept, kind)
            print(json.dumps({"question": "bytes of weights, gradients, moments at a rank",
                              "kind": kind, "ranks": size, "most": max(found),
                              "ratio_to_formula": round(max(found) / formula, 4)}))  # fmt: skip


# ---- time and overlap ----

NUM_STEPS = 10


def steps_in_pool(ranks: Any, kind: str, bucket_bytes: int | None, delay_s: float) -> float:
    """Seconds of an update at this rank."""
    prepared = Prepared(kind, ranks, bucket_bytes)
    prepared.step()
    with slow_sums(delay_s):
        start_s = time.perf_counter()
        for _ in range(NUM_STEPS):
            prepared.step()
        return (time.perf_counter() - start_s) / NUM_STEPS


@contextlib.contextmanager
def slow_sums(delay_s: float) -> Iterator[None]:
    """Sums that run in the background end later: each takes `delay_s` for 25 MB, in a row."""
    import torch.distributed as dist

    if not delay_s:
        yield
        return
    original, free_at_s = dist.all_reduce, [0.0]

    class Slow:
        def __init__(self, work: Any, num_bytes: int):
            self._work = work
            begun_s = max(time.monotonic(), free_at_s[0])
            self._end_s = free_at_s[0] = begun_s + delay_s * num_bytes / (25 << 20)

        def wait(self) -> None:
            self._work.wait()
            time.sleep(max(0.0, self._end_s - time.monotonic()))

    def slow(tensor, *args, async_op=False, **named):
        work = original(tensor, *args, async_op=async_op, **named)
        return Slow(work, tensor.nbytes) if async_op else work

    dist.all_reduce = slow
    try:
        yield
    finally:
        dist.all_reduce = original


def _pool_contestant(kind: str, bucket_bytes: int | None, delay_s: float) -> Callable[[], Any]:
    from tests.ranks import RankPool

    pool = RankPool(2)
    atexit.register(pool.close)

    def run() -> Found:
        return Found(step_s=max(pool.run(steps_in_pool, kind, bucket_bytes, delay_s)))

    return run


def _alone(num_threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(num_threads)

    def run() -> Found:
        return Found(step_s=steps_in_pool(None, "one", None, 0.0))

    return run


def show_time(rounds: int) -> None:
    contestants = {
        f"two ranks of one thread, {kind}": functools.partial(_pool_contestant, kind, None, 0.0)
        for kind in ("ddp", "moments", "fsdp")
    }
    peer = {"one process of two threads": functools.partial(_alone, 2)}
    for name, contestant in contestants.items():
        in_turns("an update", {name: contestant, **peer}, rounds)


SLOW_S = 0.6  # for 25 MB


def show_overlap(rounds: int) -> None:
    contestants = {
        "buckets of 1 MB": functools.partial(_pool_contestant, "ddp", 1 << 20, SLOW_S),
        "one bucket": functools.partial(_pool_contestant, "ddp", 1 << 40, SLOW_S),
        "no delay": functools.partial(_pool_contestant, "ddp", 1 << 20, 0.0),
    }
    in_turns("an update whose sums take 0.6 s for 25 MB", contestants, rounds)


def _first_batch(step: int, sampling: str) -> Callable[[], Any]:
    import numpy as np
    import torch

    from cs_lm.data.batches import BatchSource
    from cs_lm.data.token_store import ArrayTokens
    from cs_lm.device import World

    tokens = ArrayTokens(np.zeros(50_000_000, np.uint16))

    def run() -> None:
        source = BatchSource(tokens, BATCH, LENGTH, 0, sampling, World(torch.device("cpu")))
        source(step)

    return run


def show_resume(rounds: int) -> None:
    for sampling in ("random", "epoch"):
        contestants = {
            f"step {step:,}": functools.partial(_first_batch, step, sampling)
            for step in (1_000_000, 0)
        }
        in_turns(f"the first batch, sampling {sampling}", contestants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parts = ("wire", "memory", "time", "overlap", "resume")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if {"wire", "memory"} & set(arguments.only):
        from tests.ranks import RankPool

        pools = functools.cache(RankPool)
        if "wire" in arguments.only:
            show_wire(pools)
        if "memory" in arguments.only:
            show_memory(pools)
        for size in (2, 3, 4):
            pools(size).close()
    if "time" in arguments.only:
        show_time(arguments.rounds)
    if "overlap" in arguments.only:
        show_overlap(arguments.rounds)
    if "resume" in arguments.only:
        show_resume(arguments.rounds)


if __name__ == "__main__":
    main()
