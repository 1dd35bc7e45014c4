"""Starting and ending accelerate: device, processes, precision, trackers."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from sparse_model.io.lock import one_writer
from sparse_model.model.device import default_device
from sparse_model.training.interrupts import Interrupted, end_with_launcher

logger = logging.getLogger(__name__)

# The first process alone prepares tokenizer, corpus and dense model, while the others wait.
_PATIENCE = timedelta(hours=12)


def make_accelerator(
    folder: Path, trackers: tuple[str, ...] = (), processes: int | None = None, device: str | None = None
) -> Accelerator:
    """Accelerate as `accelerate launch` or torchrun asked for it, with the trackers writing into a run folder.

    device: of a single process; None: a CUDA device where there is one.

    Raises ValueError for a tracker that is unknown or not installed, where not as many processes take part as
    `processes` says, and for a device that torch does not have here.
    """
    where = default_device(device)
    if where.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"device={device}: each of several processes has its own device, leave out its number")
        torch.cuda.set_device(where)
    accelerator = Accelerator(
        cpu=where.type == "cpu",
        log_with=list(trackers) or None,
        project_dir=folder if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"processes={processes}: {accelerator.num_processes} took part. On CPUs `accelerate launch --cpu "
            "--num_processes N` starts a single one; use torchrun --nproc_per_node N -- SCRIPT, or "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.is_main_process:
        logger.warning("mixed precision fp16 does nothing on a CPU: training in float32; bf16 works there too")
    missing = set(trackers) - {str(tracker) for tracker in accelerator.log_with}
    if missing:  # accelerate would go on without them
        raise ValueError(f"trackers={', '.join(missing)}: unknown or not installed; pip install it or leave it out")
    return accelerator


@contextmanager
def training_in(folder: Path, accelerator: Accelerator | None, check: Callable[[], None]) -> Iterator[None]:
    """Be the folder's one writer, all processes of a launch together, and end with their launcher.

    `check` refuses a folder before anything is made there.
    """
    with end_with_launcher():
        if accelerator is not None and not accelerator.is_main_process:
            yield  # what it waits for first, the main process does once it is the writer
            return
        check()
        with one_writer(folder):
            check()  # another process may just have ended
            yield


@contextmanager
def matmul_precision(device: torch.device, tf32: bool) -> Iterator[None]:
    """TF32, or not, in the fp32 matrix products of a CUDA device."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def start_trackers(accelerator: Accelerator, folder: Path) -> None:
    """Start the trackers once the folder is claimed."""
    if accelerator.log_with:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            "sparse-bridges", config={"run": str(folder)}, init_kwargs={"wandb": {"dir": str(folder)}}
        )


@contextmanager
def ending(accelerator: Accelerator) -> Iterator[None]:
    """End trackers and process group after the training, also when it was asked to stop.

    Not after other errors: the group's other processes would wait for this one; the launcher ends them.
    """
    try:
        yield
    except Interrupted:
        accelerator.end_training()
        raise
    accelerator.end_training()
