"""Failures of many devices, how often to save, energy and price of a run."""

import math
from typing import NamedTuple

HOURS_A_YEAR = 365.25 * 24


class Failures(NamedTuple):
    """hours_between: of all machines together; save_every_s: the best interval of checkpoints;
    lost: share of the time that goes to saves, to repeated work and to restarts."""

    hours_between: float
    save_every_s: float
    lost: float


def failures(
    num_machines: int, years_a_machine: float, save_s: float, restart_s: float
) -> Failures:
    """years_a_machine  mean time between failures of one machine; save_s  time a save stops a run.

    The interval is sqrt(2 save_s M), M the time between failures. A save costs save_s in each
    interval, a failure half an interval and a restart. Source: Young 1974, A first order
    approximation to the optimum checkpoint interval; Daly 2006 has further terms.
    """
    between_s = years_a_machine * HOURS_A_YEAR * 3600 / num_machines
    every_s = math.sqrt(2 * save_s * between_s)
    lost = save_s / every_s + (every_s / 2 + restart_s) / between_s
    return Failures(between_s / 3600, every_s, lost)


def energy_kwh(num_devices: int, watts: float, overhead: float, hours: float) -> float:
    """overhead  power of the whole site over that of the devices (PUE, and hosts)."""
    return num_devices * watts * overhead * hours / 1000
