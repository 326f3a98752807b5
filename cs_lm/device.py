"""Which device a run uses."""

import torch


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if present, else the CPU.

    Raises: ValueError for an unknown device, or one that this machine does not have.
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
        raise ValueError(f"--device: got {name!r}, need one of auto, cuda, cpu, mps")
    if not present[kind]:
        raise ValueError(
            f"--device: got {name!r}, but this torch ({torch.__version__}) finds no such device "
            "here; use --device cpu or auto"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
