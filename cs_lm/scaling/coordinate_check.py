"""Coordinate check: how much activations change in the first updates, for models of many widths.

With muP (`ModelConfig.mup_base_width`), the change does not depend on the width, so that one
learning rate fits all of them. Without, it grows with the width. Source: Yang et al. 2022, Tensor
Programs V, appendix D.1.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.data.batches import Batch
from cs_lm.models.registry import build_model
from cs_lm.optim.param_groups import adamw_of, set_learning_rate
from cs_lm.training.figures import figure_of, save
from cs_lm.training.step import train_step

HEAD_SIZE = 16
_VOCAB, _LENGTH, _ROWS, _LAYERS = 256, 32, 8, 2


class Change(NamedTuple):
    """Of a width after a number of updates: the mean size of what was added to the activations.

    of  "block 1", "block 2", ... and "logits"
    """

    width: int
    step: int
    of: str
    size: float


def coordinate_check(
    widths: Sequence[int], base: int | None, lr: float, num_steps: int = 4, seed: int = 0
) -> list[Change]:
    """The changes in models of these widths. base: that of muP; None: without muP."""
    found = []
    for width in widths:
        found += _changes(width, base, lr, num_steps, seed)
    return found


def _changes(
    width: int, base: int | None, lr: float, num_steps: int, seed: int
) -> Iterator[Change]:
    config = ModelConfig(
        d_model=width, num_heads=width // HEAD_SIZE, d_ff=8 * round(width / 3), num_layers=_LAYERS,
        vocab_size=_VOCAB, context_length=_LENGTH, mup_base_width=base,
    )  # fmt: skip
    model = build_model(config, generator=torch.Generator().manual_seed(seed))
    optimizer = adamw_of(model, OptimConfig(lr=lr, lr_min=0.0))
    set_learning_rate(optimizer, lr)
    random = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(_VOCAB, (_ROWS, _LENGTH + 1), generator=random)
    before = _activations(model, ids[:, :-1])
    for step in range(1, num_steps + 1):
        train_step(model, optimizer, [Batch(ids[:, :-1], ids[:, 1:])], math.inf)
        now = _activations(model, ids[:, :-1])
        for name, value in now.items():
            yield Change(width, step, name, (value - before[name]).abs().mean().item())


@torch.no_grad()
def _activations(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    x, of_layers = model.embed(ids, torch.arange(ids.shape[-1]))
    found = {}
    for number, (layer, more) in enumerate(zip(model.layers, of_layers), 1):
        x = layer(x, **more)
        found[f"block {number}"] = x
    found["logits"] = model.logits_of(model.ln_final(x))
    return found


def slopes(changes: Sequence[Change]) -> dict[str, float]:
    """After the last update: the power of the width that each change grows with."""
    last = max(one.step for one in changes)
    found = {}
    for name in dict.fromkeys(one.of for one in changes):
        own = [one for one in changes if one.of == name and one.step == last]
        log_widths = [math.log(one.width) for one in own]
        found[name] = float(np.polyfit(log_widths, [math.log(one.size) for one in own], 1)[0])
    return found


def plot_changes(by_title: dict[str, list[Change]], path: Path) -> Path:
    """One picture for each title, with the changes after the last update against the width."""
    figure, every = figure_of(width=6 * len(by_title), columns=len(by_title))
    for axes, (title, changes) in zip(np.atleast_1d(every), by_title.items()):
        last = max(one.step for one in changes)
        for name, slope in slopes(changes).items():
            own = [one for one in changes if one.of == name and one.step == last]
            label = f"{name}: width^{slope:+.2f}"
            axes.plot(
                [one.width for one in own], [one.size for one in own], "o-", ms=4, label=label
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="width", ylabel=f"mean change after {last} updates", title=title)
        axes.legend(fontsize="small")
    heights = [axes.get_ylim() for axes in np.atleast_1d(every)]
    for axes in np.atleast_1d(every):  # to be compared
        axes.set_ylim(min(low for low, _ in heights), max(high for _, high in heights))
    return save(figure, path)
