"""Published training runs on many devices, which the predictions of meshes.py are held against.

Sources: Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters,
tables 1 and 2 and section 5.1; Korthikanti et al. 2022, Reducing activation recomputation in large
Transformer models, table 5, and the 2,240-device run in its section 6; Grattafiori et al. 2024, The
Llama 3 herd of models, table 4. Of Korthikanti et al. only the abstract could be read: table 5 is
taken from the validation of Isaev et al. 2023, Calculon, and the 39.15 s of the 2,240 devices are
those at which the abstract's 54.2% of the peak come out.

Not in the papers, but assumed:

- Narayanan et al.: micro-batches of 1 row in table 1; the fewest parts of a stage that take turns
  (the paper says that they do); of 175 B on 1,024 the mesh; gradients in float32, those of ZeRO in
  float16.
- Llama 3: 8 parts in a stage, which is one for each layer if embedding and head count as layers
  (with 1 part, the prediction is 27 to 61% too slow); moments in parts, for an FSDP that gathers
  weights once a step; FLOPs of the long rows count the masked half of the attention.
"""

from typing import NamedTuple

from cs_lm.scaling.devices import DEVICES
from cs_lm.scaling.meshes import MIXED, Mesh, Precision, Shape, cost

_WIDE_GRADIENTS = Precision(2, 4, 12)  # in float32


class PublishedRun(NamedTuple):
    """A row of a paper, with the seconds of a step or the FLOP/s of a device.

    counts_again  whether these FLOPs include what is computed again
    is_fitted     whether the numbers of `meshes.efficiency` come from this row, too
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
    precision: Precision = _WIDE_GRADIENTS

    @property
    def published(self) -> float:
        return self.seconds if self.seconds is not None else self.flops_per_s

    @property
    def predicted(self) -> float:
        device = DEVICES[self.device]
        found = cost(self.shape, self.mesh, device, self.batch_rows, self.precision)
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


def _megatron(name, shape, tensor, stages, devices, batch, tera, is_fitted=True):
    parts = 1
    if stages > 1:
        of_stage = shape.num_layers // stages
        parts = next(n for n in range(2, of_stage + 1) if of_stage % n == 0)
    mesh = Mesh(devices // (tensor * stages), tensor, stages, 1, "ddp", "full", 1, parts)
    return PublishedRun(
        f"{name} on {devices:,}", shape, mesh, "A100", batch, None, tera * 1e12, True, is_fitted
    )


def _zero(name, shape, devices, batch, micro, tera):
    mesh = Mesh(devices, sharding="fsdp", recompute="full", micro_batch=micro)
    name = f"{name} on {devices:,}, ZeRO"
    return PublishedRun(name, shape, mesh, "A100", batch, None, tera * 1e12, True, precision=MIXED)


def _korthikanti(name, shape, stages, parts, batch, full_s, selective_s, data=1, micro=1):
    for recompute, seconds in (("full", full_s), ("selective", selective_s)):
        if seconds is not None:
            mesh = Mesh(data, 8, stages, 1, "ddp", recompute, micro, parts)
            yield PublishedRun(
                f"{name}, {recompute} recompute", shape, mesh, "A100", batch, seconds,
                is_fitted=recompute == "full",
            )  # fmt: skip


def _llama(length, data, context, batch, tera):
    mesh = Mesh(data, 8, 16, context, "moments", "selective", 1, 8)
    return PublishedRun(
        f"Llama 3 405B, {length:,} tokens, on {mesh.num_devices:,}",
        _LLAMA._replace(seq_length=length), mesh, "H100", batch, None, tera * 1e12,
    )  # fmt: skip


RUNS = [
    _megatron("1.7B", _gpt(24, 2304, 24), 1, 1, 32, 512, 137),
    _megatron("3.6B", _gpt(30, 3072, 32), 2, 1, 64, 512, 138),
    _megatron("7.5B", _gpt(36, 4096, 32), 4, 1, 128, 512, 142),
    _megatron("18.4B", _gpt(40, 6144, 48), 8, 1, 256, 1024, 135),
    _megatron("39.1B", _gpt(48, 8192, 64), 8, 2, 512, 1536, 138),
    _megatron("76.1B", _gpt(60, 10240, 80), 8, 4, 1024, 1792, 140),
    _megatron("145.6B", _gpt(80, 12288, 96), 8, 8, 1536, 2304, 148),
    _megatron("310B", _gpt(96, 16384, 128), 8, 16, 1920, 2160, 155),
    _megatron("530B", _530B, 8, 35, 2520, 2520, 163),
    _megatron("1T", _1T, 8, 64, 3072, 3072, 163),
    *_korthikanti("22B", _22B, 1, 1, 4, 1.42, 1.10, micro=4),
    *_korthikanti("175B", _175B, 8, 3, 64, 18.13, 13.75),
    *_korthikanti("530B", _530B, 35, 3, 280, 49.05, 37.83),
    *_korthikanti("1T", _1T, 64, 1, 512, 94.42, 71.49),
    *_korthikanti("530B on 2,240", _530B, 35, 3, 2240, None, 39.15, data=8),
    _megatron("175B", _175B, 8, 16, 1024, 1536, 140, is_fitted=False),
    _megatron("175B", _175B, 8, 12, 384, 1536, 153, is_fitted=False),
    _megatron("175B", _175B, 8, 12, 768, 1536, 149, is_fitted=False),
    _megatron("175B", _175B, 8, 12, 1536, 1536, 141, is_fitted=False),
    _megatron("530B", _530B, 8, 35, 560, 2240, 171, is_fitted=False),
    _megatron("530B", _530B, 8, 35, 1120, 2240, 167, is_fitted=False),
    _megatron("530B", _530B, 8, 35, 2240, 2240, 159, is_fitted=False),
    _zero("175B", _175B, 384, 1536, 4, 144),
    _zero("175B", _175B, 768, 1536, 2, 88),
    _zero("175B", _175B, 1536, 1536, 1, 44),
    _zero("530B", _530B, 640, 2560, 4, 138),
    _zero("530B", _530B, 1120, 2240, 2, 98),
    _zero("530B", _530B, 2240, 2240, 1, 48),
    _llama(8192, 64, 1, 2048, 430),
    _llama(8192, 128, 1, 2048, 400),
    _llama(131072, 8, 16, 128, 380),
]
