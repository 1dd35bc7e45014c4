"""`generate` tells the passes that it makes where the prompt ends.

The shape of a pass does not say it: a prompt may come in chunks, with draft tokens behind it, or after a cache that
holds a part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from interventions.bundle.passes import Calls, Generation, generation_in_progress


class AnnouncedGenerate:
    """The `generate` of a Hugging Face model, with the prompt made known to the passes of `calls`.

    An object and no local function, so that the model can still be copied and pickled.
    """

    def __init__(self, model: Any, calls: Calls) -> None:
        self._model, self._calls = model, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with announced(self._generation(args[0] if args else None, kwargs)):
            return type(self._model).generate(self._model, *args, **kwargs)

    def _generation(self, first: Any, kwargs: dict[str, Any]) -> Generation | None:
        config = kwargs.get("generation_config")
        if kwargs.get("guidance_scale", getattr(config, "guidance_scale", None)) not in (None, 1):
            return None  # two sequences take turns, and their passes look alike
        ids = next((x for x in (first, kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        shown = ids if embeds is None else embeds
        if not isinstance(shown, Tensor) or shown.ndim < 2:  # begins with one token of its own, or raises
            return Generation(self._calls)
        columns = shown.shape[1]
        if isinstance(mask, Tensor) and mask.shape[1] > columns:  # of a filled cache only what follows it is given
            return Generation(self._calls, mask.shape[1], None, masked=True)
        return Generation(self._calls, columns, ids if embeds is None else None, masked=mask is not None)


@contextmanager
def announced(generation: Generation | None) -> Iterator[None]:
    """Passes inside belong to a generation; to none where it is None."""
    token = generation_in_progress.set(generation)
    try:
        yield
    finally:
        generation_in_progress.reset(token)
