"""How long a run of this program takes on one device of this machine."""

import torch

from cs_lm.config.run import RunConfig
from cs_lm.device import matrix_flops_per_s, resolve_device
from cs_lm.scaling.devices import CPU, Device
from cs_lm.scaling.meshes import Mesh, cost, shape_of


def predicted_seconds(config: RunConfig, tokens: float) -> float | None:
    """Of training on the tokens, without validation and saves. None where speed is not measured."""
    device = resolve_device(config.device)
    peak = matrix_flops_per_s(device, getattr(torch, config.dtype))
    if peak is None:
        return None
    shape = shape_of(config.model, config.seq_length)
    recompute = "full" if config.activation_checkpointing else "none"
    alone = Device(CPU if device.type == "cpu" else device.type, peak, 0.0, 1.0, 1.0, 1, 0.0)
    rows = config.batch_size * config.grad_accum
    step = cost(shape, Mesh(1, recompute=recompute, micro_batch=config.batch_size), alone, rows)
    return step.seconds * tokens / (rows * config.seq_length)
