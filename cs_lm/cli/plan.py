"""`python -m cs_lm plan`: what to train with a budget, and what a run takes, before it costs.

cs-lm plan --flops 1e23                                   # the best size and tokens, by all laws
cs-lm plan --num_devices 64 --hours 720 --device_kind H100
cs-lm plan --money 100000 --price 2 --served_tokens 1e13
cs-lm plan --model gpt3-175B --tokens 300e9 --num_devices 1024 --device_kind A100
cs-lm plan --show gpt3                                    # a table of the literature, recomputed
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.presets import model_names, named_model
from cs_lm.errors import Problem, UserError, no_effect_without
from cs_lm.models.stats import num_parameters
from cs_lm.scaling.compute_table import GPT3_TABLE
from cs_lm.scaling.devices import CPU, DEVICES, Device, device_named
from cs_lm.scaling.laws import (
    CORRECTED,
    LAWS,
    PF_DAY,
    Optimum,
    for_serving,
    training_flops,
)
from cs_lm.scaling.meshes import (
    USABLE,
    Cost,
    Mesh,
    Shape,
    meshes_that_fit,
    possible_meshes,
    shape_of,
)
from cs_lm.scaling.published_runs import RUNS
from cs_lm.scaling.reliability import HOURS_A_YEAR, energy_kwh, failures
from cs_lm.scaling.text_table import amount, text_table
from cs_lm.training.console import format_bytes

TABLES = ("gpt3", "runs", "devices")
_MESHES_SHOWN = 8


@dataclass(frozen=True)
class PlanConfig:
    flops: float | None = setting(None, "the budget as compute", "FLOPs")
    hours: float | None = setting(None, "the budget as time, with --num_devices", "h")
    money: float | None = setting(None, "the budget as money, with --price")
    price: float | None = setting(None, "of a device for an hour, in the unit of --money")
    num_devices: int | None = setting(None, "devices that share the run")
    device_kind: str = setting("H100", "what they are; cpu: this machine", choices=(*DEVICES, CPU))
    mfu: float = setting(0.4, "share of the devices' peak that a budget of hours or money gets")
    served_tokens: float | None = setting(
        None, "with a budget: tokens that the trained model will write or read for others"
    )
    model: str | None = setting(
        None, "in place of a budget: a model, whose run is planned", choices=model_names
    )
    parameters: float | None = setting(None, "in place of --model: a size alone")
    tokens: float | None = setting(
        None, "with --model or --parameters; default: 20 for each parameter"
    )
    seq_length: int | None = setting(None, "length of a row; default: that of the model", "tokens")
    batch_tokens: float = setting(2**22, "in an update", "tokens")
    overhead: float = setting(1.5, "power of the whole site over that of the devices")
    machine_years: float = setting(4.0, "mean time between failures of one machine", "years")
    save_s: float = setting(60.0, "how long a checkpoint stops the run", "s")
    restart_s: float = setting(600.0, "how long a restart after a failure takes", "s")
    show: str | None = setting(
        None,
        "a table instead: gpt3, the training compute in GPT-3's paper; runs, published runs beside "
        "the prediction; devices",
        choices=TABLES,
    )

    def validate(self) -> list[Problem]:
        found = _not_positive(self)
        asked = {
            "--flops": self.flops is not None,
            "--hours": self.hours is not None,
            "--money": self.money is not None,
            "--model": self.model is not None,
            "--parameters": self.parameters is not None,
            "--show": self.show is not None,
        }
        given = [flag for flag, is_given in asked.items() if is_given]
        if len(given) != 1:
            what = (
                "are given together" if given else "is missing: name a budget, a model or a table"
            )
            where = ", ".join(given) if given else "--flops"
            found.append(Problem(where, what, fix=f"give one of {', '.join(asked)}"))
        if self.hours is not None and self.num_devices is None:
            found.append(no_effect_without("--hours", "--num_devices"))
        if self.money is not None and self.price is None:
            found.append(no_effect_without("--money", "--price"))
        found += self._without_effect()
        if self.parameters is not None and self.num_devices is not None:
            what = "needs --model: how devices share a model depends on its shape"
            found.append(Problem("--num_devices", what, fix="leave it out, or name a model"))
        if not 0 < self.mfu <= 1:
            found.append(Problem("--mfu", f"got {self.mfu}", "above 0, at most 1"))
        return found

    def _without_effect(self) -> list[Problem]:
        """Flags that change nothing in what is asked for."""
        by_speed = self.hours is not None or self.money is not None
        has_mesh = self.model is not None and self.num_devices is not None
        used = {
            "tokens": (self.plans_a_run, "--model or --parameters"),
            "served_tokens": (not self.plans_a_run and self.show is None, "a budget"),
            "price": (self.money is not None or self.plans_a_run, "--money, --model, --parameters"),
            "num_devices": (self.hours is not None or self.plans_a_run, "--hours or --model"),
            "device_kind": (
                by_speed or self.plans_a_run,
                "--hours, --money, --model, --parameters",
            ),
            "mfu": (by_speed or (self.plans_a_run and not has_mesh), "a budget of hours or money"),
            "seq_length": (self.model is not None, "--model"),
            **{
                name: (has_mesh, "--model and --num_devices")
                for name in ("batch_tokens", "overhead", "machine_years", "save_s", "restart_s")
            },
        }
        fields = PlanConfig.__dataclass_fields__
        return [
            no_effect_without(f"--{name}", other)
            for name, (has_effect, other) in used.items()
            if not has_effect and getattr(self, name) != fields[name].default
        ]

    @property
    def plans_a_run(self) -> bool:
        return self.model is not None or self.parameters is not None


def _not_positive(config: PlanConfig) -> list[Problem]:
    """Numbers of FLOPs and tokens are larger here than settings of a run may be."""
    numbers = {name: value for name, value in vars(config).items() if type(value) in (int, float)}
    wrong = {name: n for name, n in numbers.items() if not 0 < n < math.inf}
    return [Problem(f"--{name}", f"got {n}", "a number above 0") for name, n in wrong.items()]


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PlanConfig, "python -m cs_lm plan", __doc__, argv)
    if config.show is not None:
        lines = {"gpt3": _gpt3, "runs": _runs, "devices": _devices}[config.show]()
    elif config.plans_a_run:
        lines = _of_a_run(config)
    else:
        lines = _of_a_budget(config)
    print("\n".join(list(lines)))  # nothing is printed before a mistake is found
    return 0


# ---- a budget ----


def _of_a_budget(config: PlanConfig) -> Iterator[str]:
    flops = _flops_of(config)
    if not flops < 1e40:
        raise UserError(Problem("--flops", f"got {flops:g}", "a budget below 1e40 FLOPs"))
    yield f"budget: {flops:.3g} FLOPs = {flops / PF_DAY:.3g} PF-days"
    rows = [("law", "parameters", "tokens", "tokens a parameter", "loss", "source")]
    for name, (optimum, source) in LAWS.items():
        rows.append(_row(name, optimum(flops), source))
    if config.served_tokens is not None:
        served = for_serving(CORRECTED, flops, config.served_tokens)
        rows.append(_row("corrected, and serving", served, "Sardana 2024"))
    yield text_table(rows)
    yield (
        "loss: nats per token of that paper's text and tokenizer. Fit your own law with "
        "cs-lm sweep and cs-lm scaling-law"
    )
    if config.served_tokens is not None:
        best = CORRECTED.optimum(flops)
        before = flops + 2 * best.parameters * config.served_tokens
        after = served.flops + 2 * served.parameters * config.served_tokens
        yield (
            f"serving {amount(config.served_tokens)} tokens: {after:.3g} FLOPs in all in place of "
            f"{before:.3g}, for the same loss"
        )


def _row(name: str, found: Optimum, source: str) -> tuple[str, ...]:
    loss = "" if found.loss is None else f"{found.loss:.3f}"
    ratio = found.tokens / found.parameters
    return name, amount(found.parameters), amount(found.tokens), f"{ratio:.3g}", loss, source


def _flops_of(config: PlanConfig) -> float:
    if config.flops is not None:
        return config.flops
    hours = config.hours
    if hours is None:  # of all devices together
        return config.money / config.price * 3600 * _speed(config)
    return hours * config.num_devices * 3600 * _speed(config)


def _speed(config: PlanConfig) -> float:
    return config.mfu * device_named(config.device_kind).peak_flops


# ---- a run ----


def _of_a_run(config: PlanConfig) -> Iterator[str]:
    device = device_named(config.device_kind)
    shape = None
    if config.model is not None:
        model = named_model(config.model)
        shape = shape_of(model, config.seq_length or model.context_length)
        parameters = num_parameters(model)
    else:
        parameters = config.parameters
    tokens = config.tokens or 20 * parameters
    flops = training_flops(parameters, tokens) if shape is None else shape.model_flops(tokens)
    rows = [
        ("parameters", f"{amount(parameters)}"),
        ("tokens", f"{amount(tokens)}, {tokens / parameters:.3g} a parameter"),
        ("FLOPs", f"{flops:.3g} = {flops / PF_DAY:.3g} PF-days"),
        ("expected loss", f"{CORRECTED.loss(parameters, tokens):.3f} nats per token of that text"),
        ("", "(Besiroglu 2024; Chinchilla's text and tokenizer)"),
        (
            "checkpoint",
            f"{format_bytes(14 * parameters)}: weights in bfloat16, optimizer in float32",
        ),
        ("token store", format_bytes((2 if _fits_16_bits(shape) else 4) * tokens)),
    ]
    yield text_table(rows, has_head=False)
    if config.num_devices is None:
        hours = flops / (config.mfu * device.peak_flops) / 3600
        yield (
            f"{_time(hours)} of one {device.name} at {config.mfu:.0%} of its peak; "
            "add --num_devices to plan a mesh"
        )
        if config.price is not None:
            yield f"price: {amount(hours * config.price)}"
        return
    yield from _of_devices(config, shape, device, tokens)


def _fits_16_bits(shape: Shape | None) -> bool:
    return shape is not None and shape.vocab_size <= 1 << 16


def _of_devices(config: PlanConfig, shape: Shape, device: Device, tokens: float) -> Iterator[str]:
    batch_rows = max(1, round(config.batch_tokens / shape.seq_length))
    found = meshes_that_fit(shape, device, config.num_devices, batch_rows)
    if not found:
        raise UserError(_no_mesh(config, shape, device, batch_rows))
    yield ""
    yield f"{len(found)} meshes fit; the quickest ({batch_rows} rows of {shape.seq_length}):"
    yield text_table([_HEAD, *(_mesh_row(mesh, cost) for mesh, cost in _different(found))])
    _, best = found[0]
    yield from _of_time(config, device, best, tokens / (batch_rows * shape.seq_length))
    yield "memory of a device with the quickest mesh:"
    yield text_table(
        [
            ("weights", format_bytes(best.weights_bytes)),
            ("gradients", format_bytes(best.gradient_bytes)),
            ("optimizer", format_bytes(best.optimizer_bytes)),
            ("activations", format_bytes(best.activation_bytes)),
            ("in all", f"{format_bytes(best.memory_bytes)} of {format_bytes(device.memory)}"),
        ],
        has_head=False,
    )
    yield (
        f"of the step: products {best.compute_s:.3g} s, tensor sums {best.tensor_s:.3g} s, bubble "
        f"{best.bubble_s:.3g} s, between stages {best.stages_s:.3g} s, contexts "
        f"{best.contexts_s:.3g} s, gradients and weights {best.gradients_s:.3g} s"
    )


def _no_mesh(config: PlanConfig, shape: Shape, device: Device, batch_rows: int) -> Problem:
    devices = f"{config.num_devices} {device.name}"
    every = possible_meshes(shape, device, config.num_devices, batch_rows)
    if not every:
        what = f"no mesh of {devices} divides {batch_rows} rows, the layers and the heads"
        fix = "choose --num_devices and --batch_tokens with common factors, such as powers of 2"
        return Problem("--num_devices", what, fix=fix)
    least = min(one.memory_bytes for _, one in every)
    what = (
        f"no mesh of {devices} holds the model: a device would need {format_bytes(least)}, and "
        f"{USABLE:.0%} of its {format_bytes(device.memory)} are used"
    )
    fix = "give more devices, others with more memory, or another --batch_tokens"
    return Problem("--num_devices", what, fix=fix)


_HEAD = (
    "data", "tensor", "stages", "context", "sharding", "recompute", "micro-batch", "parts",
    "step [s]", "MFU", "memory",
)  # fmt: skip


def _mesh_row(mesh: Mesh, cost: Cost) -> tuple[str, ...]:
    return (
        *map(str, (mesh.data, mesh.tensor, mesh.pipeline, mesh.context, mesh.sharding)),
        *map(str, (mesh.recompute, mesh.micro_batch, mesh.parts)),
        f"{cost.seconds:.3g}",
        f"{cost.mfu:.1%}",
        format_bytes(cost.memory_bytes),
    )


def _different(found: list[tuple[Mesh, Cost]]) -> list[tuple[Mesh, Cost]]:
    """The quickest mesh of each way to divide the devices."""
    kept = {}
    for mesh, cost in found:
        kept.setdefault((mesh.data, mesh.tensor, mesh.pipeline, mesh.context), (mesh, cost))
    return list(kept.values())[:_MESHES_SHOWN]


def _of_time(config: PlanConfig, device: Device, best: Cost, steps: float) -> Iterator[str]:
    hours = steps * best.seconds / 3600
    num_machines = math.ceil(config.num_devices / device.per_machine)
    risk = failures(num_machines, config.machine_years, config.save_s, config.restart_s)
    if risk.lost >= 1:
        yield (
            f"a failure every {_time(risk.hours_between)}: with saves of {config.save_s:g} s and "
            f"restarts of {config.restart_s:g} s, the run never ends"
        )
        return
    with_failures = hours / (1 - risk.lost)
    energy = energy_kwh(config.num_devices, device.watts, config.overhead, with_failures)
    shown_energy = f"{energy:,.0f} kWh" if energy < 1000 else f"{energy / 1000:,.0f} MWh"
    yield (
        f"{steps:,.0f} steps, {hours / 24:.3g} days; with failures {with_failures / 24:.3g} days, "
        f"{amount(with_failures * config.num_devices)} device-hours, {shown_energy}"
    )
    yield (
        f"a failure every {_time(risk.hours_between)}: save every {_time(risk.save_every_s / 3600)}"
        f"; {risk.lost:.1%} of the time goes to saves, repeated work and restarts"
    )
    if config.price is not None:
        yield f"price: {amount(with_failures * config.num_devices * config.price)}"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} min"
    if hours > HOURS_A_YEAR:
        return f"{hours / HOURS_A_YEAR:,.3g} years"
    return f"{hours:.3g} h" if hours < 100 else f"{hours:,.0f} h"


# ---- tables ----


def _gpt3() -> Iterator[str]:
    rows = [("model", "rule", "parameters", "tokens", "FLOPs", "published", "PF-days", "published")]
    for one in GPT3_TABLE:
        rows.append(
            (one.name, one.rule, amount(one.parameters), amount(one.tokens), f"{one.flops:.3g}",
             f"{one.published_flops:.3g}", f"{one.pf_days:.3g}", f"{one.published_pf_days:.3g}")
        )  # fmt: skip
    yield text_table(rows)
    yield "published: Brown et al. 2020, table D.1; T5 uses half of its weights a token"


def _runs() -> Iterator[str]:
    rows = [("run", "device", "published", "predicted", "error of the time", "")]
    for one in RUNS:
        unit = "s" if one.seconds is not None else "TFLOP/s"
        scale = 1 if one.seconds is not None else 1e12
        rows.append(
            (one.name, one.device, f"{one.published / scale:.2f} {unit}",
             f"{one.predicted / scale:.2f} {unit}", f"{one.error:+.1%}",
             "fitted" if one.is_fitted else "")
        )  # fmt: skip
    yield text_table(rows)
    yield "fitted: the efficiency of products is from these rows"
    yield "sources, and what is assumed: cs_lm/scaling/published_runs.py"


def _devices() -> Iterator[str]:
    rows = [("device", "TFLOP/s", "memory", "link [GB/s]", "network [GB/s]", "in a machine", "W")]
    for one in DEVICES.values():
        rows.append(
            (one.name, f"{one.peak_flops / 1e12:.0f}", format_bytes(one.memory),
             f"{one.link / 1e9:.0f}", f"{one.network / 1e9:.0f}", str(one.per_machine),
             f"{one.watts:.0f}")
        )  # fmt: skip
    yield text_table(rows)
