"""Where a model runs."""

import torch


def check_device(device: str | torch.device) -> torch.device:
    """The `torch.device` that a name means. Raises ValueError for one that torch does not have here."""
    remedy = "use cpu" + (", cuda or cuda:N" if torch.cuda.is_available() else "")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device}: torch knows no such device, {remedy}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch sees no CUDA device here, {remedy}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: torch sees {torch.cuda.device_count()} CUDA devices, {remedy}")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: nothing here was tried on it, {remedy}")
    return found


def default_device(device: str | None = None) -> torch.device:
    """The device named, or where none is, a CUDA device where there is one. Raises as `check_device`."""
    return check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
