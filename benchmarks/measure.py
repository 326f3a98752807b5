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


class Found(dict):
    """What a timed function found out besides its time: numbers, medians of which are shown."""


def in_turns(
    question: str,
    contestants: Mapping[str, Contestant],
    rounds: int = 5,
    repeats: int = 1,
    **facts: Any,
) -> dict[str, dict[str, float]]:
    """Medians of seconds and peak memory, and the first contestant's time over each other's.

    repeats  how often the timed function does what is asked about: its time is divided by that
    """
    found: dict[str, list[Found]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            result = _in_fresh_process(contestant)
            result["s"] /= repeats
            found[name].append(result)
    medians = {}
    for name, results in found.items():
        medians[name] = {
            key: _rounded(statistics.median(result[key] for result in results))
            for key in results[0]
        }
        print(json.dumps({"question": question, "who": name, **medians[name], **facts}))
    ours, *peers = contestants
    for peer in peers:
        shown = {"question": question, "ratio": f"{ours} / {peer}", "rounds": rounds}
        for key in medians[ours].keys() & medians[peer].keys():
            ratios = [a[key] / b[key] for a, b in zip(found[ours], found[peer]) if b[key]]
            if ratios:
                shown[f"{key}_ratio"] = round(statistics.median(ratios), 3)
            if ratios and key == "s":
                shown |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
        print(json.dumps(shown), flush=True)
    return medians


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_fresh_process(contestant: Contestant) -> Found:
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
    result = timed()
    elapsed_s = time.perf_counter() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    # the largest of the child processes, as often as there are cores: no less than their sum
    num_children = multiprocessing.cpu_count() if children else 0
    found = Found(s=elapsed_s, peak_mb=peak_mb() + num_children * children)
    sender.send(found | result if isinstance(result, Found) else found)
