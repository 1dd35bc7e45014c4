"""Starting accelerate: device, processes, precision, trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator


def make_accelerator(folder: Path, trackers: tuple[str, ...] = ()) -> Accelerator:
    """Accelerate as `accelerate launch` or torchrun asked for it, with the trackers writing into a run folder.

    Raises ValueError for a tracker that is unknown or not installed.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        project_dir=folder if trackers else None,
    )
    missing = set(trackers) - {str(tracker) for tracker in accelerator.log_with}
    if missing:  # accelerate would go on without them
        raise ValueError(f"trackers={', '.join(missing)}: unknown or not installed; pip install it or leave it out")
    return accelerator


def start_trackers(accelerator: Accelerator, folder: Path) -> None:
    """Start the trackers once the folder is claimed."""
    if accelerator.log_with:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            "sparse-bridges", config={"run": str(folder)}, init_kwargs={"wandb": {"dir": str(folder)}}
        )
