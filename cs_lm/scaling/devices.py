"""Devices to train on: what they can do at most, from their makers' data sheets."""

import os
from typing import NamedTuple

import torch

from cs_lm.device import matrix_flops_per_s
from cs_lm.errors import Problem, UserError


class Device(NamedTuple):
    """One device, and its links to others. All are limits of the hardware, not what a run gets.

    peak_flops   of dense matrix products in bfloat16 (CPU: float32, measured) [FLOP/s]
    memory       [bytes]
    link         to the other devices of its machine, one direction, as used by collectives [byte/s]
    network      to devices of other machines [byte/s]
    per_machine  devices in a machine
    watts        at full load, the device alone
    """

    name: str
    peak_flops: float
    memory: float
    link: float
    network: float
    per_machine: int
    watts: float


# Peaks, memory and watts: data sheets. Links: those of the machines that the published runs in
# published_runs.py used, as round numbers of what a collective gets of them.
DEVICES = {
    one.name: one
    for one in (
        Device("V100", 125e12, 32e9, 120e9, 10e9, 8, 300),
        Device("A100", 312e12, 80e9, 240e9, 20e9, 8, 400),
        Device("H100", 989e12, 80e9, 360e9, 50e9, 8, 700),
        Device("H200", 989e12, 141e9, 360e9, 50e9, 8, 700),
        Device("B200", 2250e12, 192e9, 720e9, 50e9, 8, 1000),
        Device("RTX4090", 165e12, 24e9, 25e9, 3e9, 2, 450),
    )
}
CPU = "cpu"


def device_named(name: str) -> Device:
    """A device of the table, or "cpu": this machine, measured. Raises: UserError for another."""
    if name == CPU:
        return _this_machine()
    if name not in DEVICES:
        need = f"one of {', '.join([*DEVICES, CPU])}"
        raise UserError(Problem("--device_kind", f"got {name!r}", need))
    return DEVICES[name]


def _this_machine() -> Device:
    peak = matrix_flops_per_s(torch.device(CPU), torch.float32)
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    watts = 10.0 * (os.cpu_count() or 1)  # a core at full load, roughly
    return Device(CPU, peak, memory, 5e9, 1e9, 1, watts)
