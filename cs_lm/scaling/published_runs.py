"""Published training runs on many devices, which the predictions of meshes.py are held against.

Sources: Korthikanti et al. 2022, table 5, and the 2,240-device run in its section 6; Narayanan et
al. 2021, table 1 and section 5.1; Grattafiori et al. 2024, The Llama 3 herd of models, table 4.

Not in the papers, but assumed: 4 rows in a forward pass of 22 B; of Llama 3, 8 parts in a stage
(with 1 part, the prediction is 15 to 35% too slow); for Narayanan et al., 1 part. And the form of
`efficiency` was chosen with all rows of Korthikanti et al. in view, its two numbers with two.
"""

from typing import NamedTuple

from cs_lm.scaling.devices import DEVICES
from cs_lm.scaling.meshes import Mesh, Shape, cost


class PublishedRun(NamedTuple):
    """A row of a paper, with the seconds of a step or the FLOP/s of a device.

    counts_again  whether these FLOPs include what is computed again
    is_fitted     whether the numbers of `meshes.efficiency` come from this row
    """

    name: str
    shape: Shape
    mesh: Mesh
    device: str
    batch_rows: int
    seconds: float | None = None
    flops_per_s: float | None = None
    counts_again: bool = False
    is_fitted: bool = False

    @property
    def published(self) -> float:
        return self.seconds if self.seconds is not None else self.flops_per_s

    @property
    def predicted(self) -> float:
        device = DEVICES[self.device]
        found = cost(self.shape, self.mesh, device, self.batch_rows)
        if self.seconds is not None:
            return found.seconds
        own = found.mfu * device.peak_flops
        return found.hardware_flops_per_s if self.counts_again else own

    @property
    def error(self) -> float:
        """Of the predicted time of a step, relative to the published one."""
        ratio = self.predicted / self.published
        return ratio - 1 if self.seconds is not None else 1 / ratio - 1


def _gpt(num_layers: int, d_model: int, num_heads: int) -> Shape:
    return Shape(num_layers, d_model, num_heads, num_heads, 4 * d_model, 51200, False, 2048)


_22B, _175B = _gpt(48, 6144, 64), _gpt(96, 12288, 96)
_530B, _1T = _gpt(105, 20480, 128), _gpt(128, 25600, 160)
_LLAMA = Shape(126, 16384, 128, 8, 53248, 128256, True, 8192)


def _korthikanti(name, shape, stages, parts, batch, full_s, selective_s, data=1, micro=1):
    for recompute, seconds in (("full", full_s), ("selective", selective_s)):
        if seconds is not None:
            mesh = Mesh(data, 8, stages, 1, "ddp", recompute, micro, parts)
            is_fitted = recompute == "full" and name in ("22B", "1T")
            yield PublishedRun(
                f"{name}, {recompute} recompute", shape, mesh, "A100", batch, seconds,
                is_fitted=is_fitted,
            )  # fmt: skip


def _narayanan(name, shape, stages, data, micro, batch, tera):
    mesh = Mesh(data, 8, stages, 1, "ddp", "full", micro)
    return PublishedRun(
        f"{name} on {mesh.num_devices:,}", shape, mesh, "A100", batch, None, tera * 1e12, True
    )


RUNS = [
    *_korthikanti("22B", _22B, 1, 1, 4, 1.42, 1.10, micro=4),
    *_korthikanti("175B", _175B, 8, 3, 64, 18.13, 13.75),
    *_korthikanti("530B", _530B, 35, 3, 280, 49.05, 37.83),
    *_korthikanti("1T", _1T, 64, 1, 512, 94.42, 71.49),
    *_korthikanti("530B on 2,240", _530B, 35, 3, 2240, None, 39.15, data=8),
    _narayanan("145.6B", _gpt(80, 12288, 96), 8, 24, 2, 2304, 148),
    _narayanan("310B", _gpt(96, 16384, 128), 16, 15, 1, 2160, 155),
    _narayanan("530B", _530B, 35, 9, 1, 2520, 163),
    _narayanan("1T", _1T, 64, 6, 1, 3072, 163),
    _narayanan("175B", _175B, 16, 8, 1, 1536, 140),
    PublishedRun(
        "Llama 3 405B on 8,192", _LLAMA, Mesh(64, 8, 16, 1, "ddp", "selective", 1, 8), "H100", 2048,
        None, 430e12,
    ),
    PublishedRun(
        "Llama 3 405B on 16,384", _LLAMA, Mesh(128, 8, 16, 1, "ddp", "selective", 1, 8), "H100",
        2048, None, 400e12,
    ),
]  # fmt: skip
