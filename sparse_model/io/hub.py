"""The Hugging Face hub: downloads of files that cannot execute anything, and its refusals as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sparse_model.io.atomic import WriteFailed, failed_writes_named

_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError)
_HARMLESS = ["*.safetensors", "*.json", "*.md", "merges.txt", "*/merges.txt"]


def download(name: str, *, tried: str = "", **options: Any) -> Path:
    """The folder of a repository's weights, JSON and cards, from the cache or the hub; whole, or an OSError says why.

    Nothing else is fetched: no Python, no pickled weights. `tried` begins what an error says; `options` are those of
    `huggingface_hub.snapshot_download`.
    """
    with hub_errors_named(tried or f"cannot load {name!r}: it is no local folder"):
        return Path(snapshot_download(name, allow_patterns=_HARMLESS, **options))


@contextmanager
def hub_errors_named(doing: str) -> Iterator[None]:
    """Turn the dozen types that the hub client raises into an OSError: what was tried, the reason and the remedy."""
    try:
        with failed_writes_named(Path(constants.HF_HUB_CACHE)):
            yield
    except WriteFailed:
        raise
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, _ABSENT) else OSError
        raise kind(f"{doing}, and {_reason(error)}") from error


def _reason(error: Exception) -> str:
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return "it is no name on the hub either: use owner/name"
    if isinstance(error, GatedRepoError):
        return f"{hub} asks for its owner's leave: ask on its page, then hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} has no such revision of it: name one of its branches, tags or commits"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has none of that name that your token may see: check the spelling, or hf auth login"
    if status in (401, 403):
        return f"{hub} does not take your token for that: hf auth login with one that allows it"
    if status is not None and status < 500:
        return f"{hub} refused ({_first_line(error)}): check the name and the arguments"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) and constants.is_offline_mode():
        return "the hub may not be asked: unset HF_HUB_OFFLINE, or give a folder of save_pretrained()"
    return (
        f"the connection to {hub} failed or broke off ({_first_line(error)}): check the network and give the same call "
        "again; what is not whole is not used"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
