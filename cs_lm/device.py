"""The device of a run, its speed, and the versions of the software."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from cs_lm.errors import Problem, UserError


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if present, else the CPU.

    Raises: UserError for an unknown device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.split(":")[0]
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in present:
        raise UserError(Problem("--device", f"got {name!r}", "one of auto, cuda, cpu, mps"))
    if not present[kind]:
        what = (
            f"got {name!r}, but this torch ({torch.__version__}) finds no such device on "
            f"this machine"
        )
        raise UserError(Problem("--device", what, fix="use --device cpu or auto"))
    return torch.device(name)


class World(NamedTuple):
    """The device of this process, and its share of the work.

    rank, size  this process is number `rank` of `size` that train one model together
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def share_of(self, count: int) -> slice:
        """This rank's consecutive part of `count` things; part sizes differ by at most 1."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def matrix_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Highest measured speed of a square matrix product [floating-point operations a second].

    None if the device cannot compute such a product.
    Why the best of many, of several sizes: other work of the machine can only make a product
    slower. While one core of two is busy, few products reach full speed.
    Cost: about a tenth of a second, also on a CPU that has no instructions for bfloat16.
    """

    def product_s(matrix: Tensor) -> float:
        start_s = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        return time.perf_counter() - start_s

    best, largest = 0.0, 1024 if device.type == "cpu" else 4096
    end_s, size = time.perf_counter() + _MEASURED_S, 128
    while size <= largest:
        try:
            matrix = torch.ones(size, size, device=device, dtype=dtype)
            times = [product_s(matrix) for _ in range(5)]
        except RuntimeError:  # the device cannot compute this product
            return best or None
        best = max(best, 2 * size**3 / min(times))
        if 8 * 5 * min(times) > end_s - time.perf_counter():  # the next size takes longer
            break
        size *= 2
    while time.perf_counter() < end_s:
        best = max(best, 2 * len(matrix) ** 3 / product_s(matrix))
    return best


_MEASURED_S = 0.1


def measured_speed(device: torch.device, dtype: str) -> tuple[float | None, str]:
    """`matrix_flops_per_s`, and a text that also names the speed of float32 if that is higher.

    A CPU that has no instructions for bfloat16 is slower in it by two orders of magnitude.
    """
    flops_per_s = matrix_flops_per_s(device, getattr(torch, dtype))
    if flops_per_s is None:
        return None, "not measured"
    text = f"{flops_per_s / 1e9:,.0f} GFLOP/s"
    if dtype != "float32":
        of_float32 = matrix_flops_per_s(device, torch.float32)
        if of_float32 is not None and of_float32 > 1.2 * flops_per_s:  # beyond measurement noise
            text += f"; float32: {of_float32 / 1e9:,.0f} GFLOP/s, so --dtype float32 is faster here"
    return flops_per_s, text


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("cs_lm", "numpy", "regex"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from its folder, without being installed
            pass
    return found
