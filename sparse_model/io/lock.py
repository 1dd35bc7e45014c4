"""One writer at a time: a lock file that its process holds, however that ends; the next one learns who it is."""

import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparse_model.io.atomic import LOCK, clean_up, failed_writes_named

logger = logging.getLogger(__name__)

_held: dict[Path, int] = {}
"""The folders whose writer this process is, with the thread that it writes from."""


class InUse(OSError):
    """A folder that another process writes into; the message names host, process and command."""


@contextmanager
def one_writer(folder: str | Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made where there is none; raises InUse.

    What killed processes left there is removed first. May be entered again by what is called inside.
    """
    folder = Path(folder).resolve()
    me = threading.get_ident()
    if _held.get(folder) == me:
        yield
        return
    if folder in _held:
        raise InUse(f"{folder} is in use by another thread of this process: wait for it")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with hold(folder / LOCK):
            _held[folder] = me
            try:
                clean_up(folder)
                yield
            finally:
                del _held[folder]
    finally:
        for path in made:  # a start that is refused leaves none
            with suppress(OSError):
                path.rmdir()


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which is there only meanwhile. Where another process holds it, wait for that or raise InUse."""
    with failed_writes_named(path):
        descriptor = _take(path, wait)
    try:
        yield
    finally:
        # While it is held: who waits for the file finds that it has gone, and makes another.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another one has just removed the folder that it made
            continue
        try:
            _lock(descriptor, path, wait)
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its holder has removed it
    with suppress(OSError):  # a full disk
        os.truncate(descriptor, 0)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({command})".encode())
    return descriptor


def _holder(descriptor: int) -> str:
    """Who holds a lock file. It says so just after it has taken it, unless the disk is full."""
    for _ in range(20):
        if said := os.pread(descriptor, 1000, 0):
            return said.decode(errors="replace")
        time.sleep(0.01)
    return "another process"


def _lock(descriptor: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        if not wait:
            raise InUse(f"{path.parent} is in use by {holder}: wait for it, or stop it") from error
        logger.info("waiting for %s", holder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("%s lies on a file system without locks: nobody notices a second writer", path.parent)
