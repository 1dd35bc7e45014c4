"""A TransformerLens view of the dense model that several threads can call, and that cuts no prompt.

TransformerLens keeps parts of the pass in progress on the model: the batch size for its position embedding, and the
cache of the last step of `generate`. Two threads would read each other's; here each thread has its own.
"""

import threading
from collections.abc import Generator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import PosEmbedBridge

from interventions.bundle.generating import announced
from interventions.bundle.passes import Generation
from sparse_model.model.lengths import check_length

_threads = threading.local()


class PerThread:
    """An attribute that each thread sets and reads for itself."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def _values(self, module: nn.Module) -> dict[str, Any]:
        if not hasattr(_threads, "values"):
            _threads.values = WeakKeyDictionary()
        return _threads.values.setdefault(module, {})

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        try:
            return self._values(module)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        self._values(module)[self._name] = value

    def __delete__(self, module: nn.Module) -> None:
        self._values(module).pop(self._name, None)


class ThreadedPosEmbed(PosEmbedBridge):
    """TransformerLens' position embedding; the batch size belongs to the thread that runs the pass."""

    _current_batch_size = PerThread()


class ThreadedBridge(TransformerBridge):
    """TransformerLens' model; what `generate` keeps between its steps belongs to its thread."""

    _capture_hf_cache = PerThread()
    _last_hf_cache = PerThread()

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> Tensor:
        """As in TransformerLens, but a text longer than the context is a ValueError without truncate=True."""
        tokens = super().to_tokens(input, prepend_bos, padding_side, move_to_device, truncate=bool(truncate))
        if truncate is None:
            check_length(tokens.shape[-1], self.cfg.n_ctx)
        return tokens

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; its first pass is the prompt."""
        with announced(self._generation(kwargs)):
            return super().generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        """As in TransformerLens; its first pass is the prompt."""
        generation, steps = self._generation(kwargs), super().generate_stream(*args, **kwargs)
        while True:
            with announced(generation):  # between the steps the caller may do something else
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    def _generation(self, kwargs: dict[str, Any]) -> Generation | None:
        bundle = getattr(self, "bundle", None)
        masked = kwargs.get("attention_mask") is not None
        return None if bundle is None else Generation(bundle.calls, masked=masked)
