"""Predicts memory and time of a training step on many devices, and ranks the ways to share it.

    time = (compute + tensor-parallel sums) (1 + (p - 1) / (v m)) + sends between stages
           + gathers of contexts + what moves weights and gradients

with p stages of v parts each and m micro-batches. A device gets `efficiency` of its peak; all else
goes at the speed of the links, while nothing is computed, but for weights and gradients: half of
the shorter of their time and that of the products is hidden. Activations have 2 bytes a number,
weights and gradients those of a `Precision`.

Sources: activations from Korthikanti et al. 2022, Reducing activation recomputation in large
Transformer models, equations 1 to 6; the bubble from Narayanan et al. 2021, Efficient large-scale
language model training on GPU clusters, section 2.2; parts of the state from Rajbhandari et al.
2020, ZeRO. The two numbers of `efficiency` are fitted to rows of published_runs.py; the half that
is hidden was chosen for the rows of ZeRO's third stage there.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from cs_lm.config.model import ArchitectureConfig, ModelConfig
from cs_lm.scaling.devices import CPU, Device

RECOMPUTE = ("none", "selective", "full")
SHARDING = ("ddp", "moments", "fsdp")
_HALF = 2  # bytes of a bfloat16 number
USABLE = 0.9  # share of a device's memory; the rest is for buffers and fragments
_HIDDEN = 0.5  # share of the shorter time: moving weights and gradients, or the products


class Precision(NamedTuple):
    """Bytes a parameter."""

    weight: int
    gradient: int
    optimizer: int


MIXED = Precision(2, 2, 12)  # optimizer: a float32 copy and two moments
FLOAT32 = Precision(4, 4, 8)  # as this program keeps them, also with --dtype bfloat16


class Shape(NamedTuple):
    """What decides the cost of a model.

    num_kv_heads  heads of keys and values
    num_tables    tables of embeddings: 2 if the head has one of its own
    """

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    vocab_size: int
    is_gated: bool
    seq_length: int
    num_tables: int = 1

    @property
    def in_layers(self) -> float:
        """Weights in the matrices of all layers."""
        d = self.d_model
        attention = 2 * d * d * (1 + self.num_kv_heads / self.num_heads)
        return self.num_layers * (attention + (3 if self.is_gated else 2) * d * self.d_ff)

    @property
    def parameters(self) -> float:
        """Norms, biases and tables of positions are too few to count."""
        return self.in_layers + self.num_tables * self.vocab_size * self.d_model

    @property
    def in_products(self) -> float:
        """Weights of matrix products: all but the table that tokens are looked up in."""
        return self.in_layers + self.vocab_size * self.d_model

    @property
    def attention_flops(self) -> float:
        """Of scores and their use in a forward pass, for each token; the masked half counts."""
        return 4.0 * self.num_layers * self.d_model * self.seq_length

    def model_flops(self, tokens: float) -> float:
        """Of training on the tokens, without what is computed again."""
        return (6 * self.in_products + 3 * self.attention_flops) * tokens

    def hardware_flops(self, tokens: float, recompute: str) -> float:
        """And with what is computed again in the backward pass."""
        again = 0.0 if recompute == "none" else self.attention_flops
        if recompute == "full":
            again += 2 * self.in_layers
        return self.model_flops(tokens) + again * tokens


def shape_of(config: ArchitectureConfig, seq_length: int) -> Shape:
    return Shape(
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.num_heads,
        config.d_ff,
        config.vocab_size,
        isinstance(config, ModelConfig),
        seq_length,
        1 if getattr(config, "tied_head", False) else 2,
    )


class Mesh(NamedTuple):
    """How devices share a step.

    data, tensor, pipeline, context   their product is the number of devices
    sharding     of the state among `data` and `context`: one of SHARDING
    micro_batch  rows of a forward pass
    parts        v, the parts of a stage that take turns (interleaved schedule)
    """

    data: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sharding: str = "ddp"
    recompute: str = "selective"
    micro_batch: int = 1
    parts: int = 1

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context


class Cost(NamedTuple):
    """Of a step: seconds, their parts, and bytes a device; mfu: share of the peak that the
    model's own operations are."""

    seconds: float
    compute_s: float
    tensor_s: float
    bubble_s: float
    stages_s: float
    contexts_s: float
    gradients_s: float
    weights_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    mfu: float
    hardware_flops_per_s: float  # of one device, what is computed again included

    @property
    def memory_bytes(self) -> float:
        parts = self.weights_bytes, self.gradient_bytes, self.optimizer_bytes
        return sum(parts) + self.activation_bytes


# Share of the peak, and the width at which products get half of it.
HIGHEST, HALF_AT = 0.666, 654.0
_CPU_HIGHEST, _CPU_HALF_AT = 0.6, 60.0


def efficiency(d_model: int, tensor: int = 1, is_cpu: bool = False) -> float:
    """Share of the peak that a device's matrix products get: e w / (w + h), w = d_model / sqrt(t).

    A device's matrices have about d_model rows and d_model / t columns; w is their geometric mean.
    e and h: least squares of the logarithms of the step times of 14 published runs, those marked
    as fitted in published_runs.py, with w of 2,048 and more. On a CPU: fitted to this project's
    own runs (benchmarks/scaling.py).
    """
    highest, half_at = (_CPU_HIGHEST, _CPU_HALF_AT) if is_cpu else (HIGHEST, HALF_AT)
    width = d_model / math.sqrt(tensor)
    return highest * width / (width + half_at)


def cost(
    shape: Shape, mesh: Mesh, device: Device, batch_rows: int, precision: Precision = MIXED
) -> Cost:
    """Of one update on `batch_rows` rows of `seq_length` tokens."""
    p, t, c, b = mesh.pipeline, mesh.tensor, mesh.context, mesh.micro_batch
    micro_batches = batch_rows / (mesh.data * b)
    tokens = batch_rows * shape.seq_length
    speed = device.peak_flops * efficiency(shape.d_model, t, device.name == CPU)
    flops = shape.hardware_flops(tokens, mesh.recompute)
    compute_s = flops / (mesh.num_devices * speed)
    tensor_s = micro_batches * _tensor_bytes(shape, mesh) / device.link
    bubble = (p - 1) / (mesh.parts * micro_batches)
    bubble_s = (compute_s + tensor_s) * bubble
    activations = _HALF * shape.seq_length / c * b * shape.d_model
    link = _link_between_machines(mesh, device)
    stages_s = 0.0 if p == 1 else 2 * mesh.parts * micro_batches * activations / t / link
    contexts_s = _context_bytes(shape, mesh, micro_batches) / link
    gradients_s = _data_bytes(shape, mesh, micro_batches, precision) / link
    gradients_s -= _HIDDEN * min(gradients_s, compute_s)
    seconds = compute_s + tensor_s + bubble_s + stages_s + contexts_s + gradients_s
    of_all = seconds * mesh.num_devices
    return Cost(
        seconds,
        compute_s,
        tensor_s,
        bubble_s,
        stages_s,
        contexts_s,
        gradients_s,
        *state_bytes(shape.parameters, mesh, precision),
        activation_bytes(shape, mesh, micro_batches),
        shape.model_flops(tokens) / (of_all * device.peak_flops),
        flops / of_all,
    )


def _tensor_bytes(shape: Shape, mesh: Mesh) -> float:
    """That a device sends and receives in a micro-batch, for sums among its tensor team.

    Each layer has two sums forward and two backward, and with full recomputation two more.
    """
    t = mesh.tensor
    sums = (6 if mesh.recompute == "full" else 4) * shape.num_layers / mesh.pipeline
    activations = _HALF * shape.seq_length / mesh.context * mesh.micro_batch * shape.d_model
    return sums * 2 * (t - 1) / t * activations


def _data_bytes(shape: Shape, mesh: Mesh, micro_batches: float, precision: Precision) -> float:
    """For sums of gradients and, where the state is sharded, gathers of weights.

    A sum costs each byte twice: summed parts, then a gather of them. Who has a part of the moments
    needs the sum of that part alone, and then gathers weights (this program sums all gradients
    there, too). With fsdp, each micro-batch gathers the weights forward and backward, and sums its
    gradients.
    """
    size = mesh.data * mesh.context
    of_each = {
        "ddp": 2 * precision.gradient,
        "moments": precision.gradient + precision.weight,
        "fsdp": micro_batches * (precision.gradient + 2 * precision.weight),
    }
    own = shape.parameters / (mesh.tensor * mesh.pipeline)
    return of_each[mesh.sharding] * own * (size - 1) / size


def _context_bytes(shape: Shape, mesh: Mesh, micro_batches: float) -> float:
    """For gathers of keys and values forward and again backward, and sums of their gradients."""
    heads = shape.num_kv_heads / shape.num_heads / mesh.tensor
    keys = 2 * _HALF * shape.seq_length * mesh.micro_batch * shape.d_model * heads
    layers = shape.num_layers / mesh.pipeline
    return 3 * micro_batches * layers * keys * (mesh.context - 1) / mesh.context


def _link_between_machines(mesh: Mesh, device: Device) -> float:
    is_one_machine = mesh.num_devices <= device.per_machine
    return device.link if is_one_machine else device.network


def state_bytes(
    parameters: float, mesh: Mesh, precision: Precision = MIXED
) -> tuple[float, float, float]:
    """Bytes a device for weights, gradients and optimizer."""
    own = parameters / (mesh.tensor * mesh.pipeline)
    parts = mesh.data * mesh.context
    weights, gradients, optimizer = (size * own for size in precision)
    if mesh.sharding in ("moments", "fsdp"):
        optimizer /= parts
    if mesh.sharding == "fsdp":
        weights, gradients = weights / parts, gradients / parts
    return weights, gradients, optimizer


def activation_bytes(shape: Shape, mesh: Mesh, micro_batches: float) -> float:
    """Bytes a device keeps for the backward pass; the first stage keeps most.

    A layer of s positions, b rows, width h and a heads keeps s b h (34 + 5 a s / h) bytes; its
    second term is that of the attention weights, which selective recomputation drops. With t tensor
    ranks and sequence parallelism, each has 1 / t of it.
    """
    s, b, h = shape.seq_length / mesh.context, mesh.micro_batch, shape.d_model
    of_layer = {"none": 34 + 5 * shape.num_heads * shape.seq_length / h, "selective": 34, "full": 2}
    p, v = mesh.pipeline, mesh.parts
    under_way = min(1.0, micro_batches / p) * (1 + (p - 1) / (p * v) if v > 1 else 1)
    layers = shape.num_layers * under_way
    found = layers * s * b * h * of_layer[mesh.recompute] / mesh.tensor
    if mesh.recompute == "full":  # one layer is there in full while it is computed again
        found += s * b * h * of_layer["none"] / mesh.tensor
    return found


def meshes_that_fit(
    shape: Shape, device: Device, num_devices: int, batch_rows: int
) -> list[tuple[Mesh, Cost]]:
    """The ways to share a step whose memory fits, the quickest one first."""
    every = possible_meshes(shape, device, num_devices, batch_rows)
    found = [one for one in every if one[1].memory_bytes <= USABLE * device.memory]
    return sorted(found, key=lambda one: one[1].seconds)


def possible_meshes(
    shape: Shape, device: Device, num_devices: int, batch_rows: int
) -> list[tuple[Mesh, Cost]]:
    """The ways to share a step that divide its layers, heads and rows."""
    every = _dividing(shape, device, num_devices, batch_rows)
    return [(mesh, cost(shape, mesh, device, batch_rows)) for mesh in every]


def _dividing(shape: Shape, device: Device, n: int, batch_rows: int) -> Iterator[Mesh]:
    tensors = [t for t in _powers(device.per_machine) if shape.num_kv_heads % t == 0]
    for t, p, c in itertools.product(tensors, range(1, min(n, shape.num_layers) + 1), _powers(64)):
        if n % (t * p * c) or shape.num_layers % p or (c > 1 and shape.seq_length // c < 2048):
            continue
        d = n // (t * p * c)
        for b in _powers(16):
            if batch_rows % (d * b):
                continue
            shardings = SHARDING if d * c > 1 else ("ddp",)
            if p > 1:
                shardings = tuple(one for one in shardings if one != "fsdp")
            parts = {1, *(v for v in (2, 3) if p > 1 and shape.num_layers % (p * v) == 0)}
            for sharding, recompute, v in itertools.product(shardings, RECOMPUTE, sorted(parts)):
                yield Mesh(d, t, p, c, sharding, recompute, b, v)


def _powers(at_most: int) -> list[int]:
    return [2**k for k in range(int(math.log2(max(1, at_most))) + 1)]
