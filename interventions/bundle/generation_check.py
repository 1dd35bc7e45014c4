"""Whether generation with a cache goes on from the prompt that it was given.

A release of transformers may rename the argument in which a wrapper hands on the cache. Nothing fails then: the prompt
is lost, and the text goes on from its last token alone.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

_ROWS, _LENGTH, _NEW = 8, 8, 4
_MOST_DIFFERENT = _ROWS // 4  # in half precision a cache may turn a near tie; a lost prompt changes most rows
_checked: set[str] = set()


@torch.no_grad()
def check_generation(model: Any, cache_option: str, d_vocab: int, n_ctx: int) -> None:
    """Compare greedy tokens with a cache and without one, once in a process for each class of model.

    `cache_option` is what `model.generate` calls its switch. Raises RuntimeError with the versions and the remedy where
    they differ in more than a quarter of the rows.
    """
    length = min(_LENGTH, n_ctx - _NEW)
    name = f"{type(model).__name__} {type(getattr(model, 'original_model', None)).__name__}"
    if length < 1 or name in _checked:
        return
    device = next(model.parameters()).device
    rows = torch.randint(d_vocab, (_ROWS, length), generator=torch.Generator().manual_seed(0)).to(device)
    cached, plain = (_generate(model, rows, **{cache_option: use}) for use in (True, False))
    if int((cached != plain).any(1).sum()) > _MOST_DIFFERENT:
        raise RuntimeError(
            f"{' with '.join(_versions())}: generation with a cache loses the prompt. Install versions that were "
            f"tested: pip install {' '.join(map(repr, _tested()))}"
        )
    _checked.add(name)


_PACKAGES = ("transformers", "transformer-lens")


def _versions() -> list[str]:
    """The packages with their versions, of those that are installed: `load_hf` does without TransformerLens."""
    versions = []
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return versions


def _tested() -> list[str]:
    """What this package asks for; its name where it is not installed but only on the path."""
    with suppress(PackageNotFoundError):
        return [line for line in requires("sparse-bridges") or () if line.startswith(_PACKAGES)]
    return ["sparse-bridges"]


def _generate(model: Any, rows: torch.Tensor, **cache: bool) -> torch.Tensor:
    options = {"max_new_tokens": _NEW, "do_sample": False, **cache}
    if "use_past_kv_cache" in cache:  # TransformerLens
        return model.generate(rows, stop_at_eos=False, verbose=False, **options)
    mask = torch.ones_like(rows)
    return model.generate(rows, attention_mask=mask, min_new_tokens=_NEW, pad_token_id=0, **options)
