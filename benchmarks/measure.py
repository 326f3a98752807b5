"""Times in turns: A B A B ..., each in a fresh process, and the ratio pair by pair.

A benchmark names its contestants in a dictionary; each contestant is a function that prepares
what is not timed and returns the function that is. One JSON line a measurement.
"""

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Contestant = Callable[[], Callable[[], Any]]


def in_turns(
    question: str, contestants: Mapping[str, Contestant], rounds: int = 5, **facts: Any
) -> dict[str, dict[str, float]]:
    """Medians of seconds and peak memory, and the first contestant's time over each other's."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            elapsed_s, peak_mb = _in_fresh_process(contestant)
            times[name].append(elapsed_s)
            peaks[name].append(peak_mb)
    ours, *peers = contestants
    results = {}
    for name in contestants:
        results[name] = {
            "median_s": round(statistics.median(times[name]), 4),
            "peak_mb": round(statistics.median(peaks[name])),
        }
        print(json.dumps({"question": question, "who": name, **results[name], **facts}))
    for peer in peers:
        ratios = [a / b for a, b in zip(times[ours], times[peer])]
        shown = {
            "time_ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3), "most": round(max(ratios), 3), "rounds": rounds,
        }  # fmt: skip
        print(json.dumps({"question": question, "ratio": f"{ours} / {peer}", **shown}), flush=True)
    return results


def _in_fresh_process(contestant: Contestant) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(contestant, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _run(contestant: Contestant, sender) -> None:
    timed = contestant()
    start = time.perf_counter()
    timed()
    elapsed_s = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # the largest of the child processes, as often as there are cores: no less than their sum
    num_children = multiprocessing.cpu_count() if children else 0
    sender.send((elapsed_s, (own + num_children * children) / 1024))
