"""`python -m cs_lm cache`: lists what is in data/, and removes some of it on request.

Every tokenizer and token store there can be made again by the command that made it. Text that came
through a pipe cannot: it is removed by name only. Nothing that a process is using is removed.
"""

import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.data.cache import DATA, CacheEntry, entries, remove
from cs_lm.errors import Problem, UserError
from cs_lm.training.console import format_bytes

_DAY_S = 86_400


@dataclass(frozen=True)
class CacheConfig:
    remove: tuple[str, ...] = setting((), "remove these entries, named as in the list")
    unused_days: float | None = setting(None, "remove entries unused for this many days", "days")

    def validate(self) -> list[Problem]:
        if self.unused_days is not None and not 0 <= self.unused_days < math.inf:
            return [Problem("--unused_days", f"got {self.unused_days}", "0 or more")]
        if self.unused_days is not None and self.unused_days >= 1e9:
            return [Problem("--unused_days", f"got {self.unused_days}", "less than 1e9")]
        return []


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(CacheConfig, "python -m cs_lm cache", __doc__, argv)
    found = list(entries())
    asked = {Path(name).name for name in config.remove}  # shells complete it to `data/name/`
    unknown = asked - {entry.path.name for entry in found}
    if unknown:
        raise UserError(
            f"--remove: got {', '.join(sorted(unknown))}, which is not in {DATA}; "
            "`cs-lm cache` lists what is"
        )
    if not config.remove and config.unused_days is None:
        _show(found)
        return 0
    before_s = -math.inf
    if config.unused_days is not None:
        before_s = time.time() - _DAY_S * config.unused_days
    chosen = [
        entry
        for entry in found
        if entry.path.name in asked or (entry.used_s < before_s and entry.can_be_made_again)
    ]
    in_use = []
    for entry in chosen:
        if remove(entry):
            print(f"removed {entry.path} ({format_bytes(entry.num_bytes)})")
        else:
            in_use.append(str(entry.path))
    if not chosen:
        print("no entry is that old")
    if in_use:
        raise UserError(
            Problem(
                "cache",
                f"a process is using {', '.join(in_use)}",
                fix="these entries were not removed",
            )
        )
    return 0


def _show(found: list[CacheEntry]) -> None:
    if not found:
        print(f"{DATA.resolve()} holds no text, tokenizer or token store that was made there")
        return
    width = max(len(entry.path.name) for entry in found)
    print(f"{'in ' + str(DATA):<{width}}  {'what':<24}  {'size':>9}  last use")
    for entry in found:
        used = datetime.datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M")
        kind = entry.kind if entry.is_complete else f"unfinished {entry.kind}"
        print(f"{entry.path.name:<{width}}  {kind:<24}  {format_bytes(entry.num_bytes):>9}  {used}")
    print(f"{'together':<{width}}  {'':<24}  {format_bytes(sum(e.num_bytes for e in found)):>9}")
