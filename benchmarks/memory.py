"""Memory that the operating system counts: page faults of a step, megabytes of a loss.

python -m benchmarks.memory [--rounds 3]
"""

import argparse
import functools
import resource

from benchmarks.measure import Found, in_turns, peak_mb

NUM_FLOATS, NUM_FILLS = 10_000_000, 20
NUM_ROWS, VOCAB_SIZE, WIDTH = 2048, 8192, 16


def page_faults(keeps_memory: bool):
    """Of filling a tensor of 40 MB, after others like it were freed."""
    import torch

    from cs_lm.training.malloc import keep_freed_memory

    if keeps_memory:
        keep_freed_memory()

    def timed() -> Found:
        for _ in range(NUM_FILLS):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(NUM_FLOATS).fill_(1.0)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return Found(page_faults=after - before)

    return timed


def loss_memory(name: str):
    """Peak of the loss and its gradients, in multiples of the logits."""
    import torch

    from cs_lm.ops.fused import OPS

    x = torch.randn(NUM_ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (NUM_ROWS,))
    OPS[name].linear_cross_entropy(x[:8], weight, targets[:8])[0].backward()

    def timed() -> Found:
        before_mb = peak_mb()
        OPS[name].linear_cross_entropy(x, weight, targets)[0].backward()
        logits_mb = NUM_ROWS * VOCAB_SIZE * 4 / 2**20
        return Found(multiples_of_logits=(peak_mb() - before_mb) / logits_mb)

    return timed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds
    contestants = {
        "freed memory kept": functools.partial(page_faults, True),
        "given back": functools.partial(page_faults, False),
    }
    in_turns("page faults of a tensor of 40 MB", contestants, rounds)
    contestants = {name: functools.partial(loss_memory, name) for name in ("fast", "clear")}
    in_turns("memory of the loss", contestants, rounds)


if __name__ == "__main__":
    main()
