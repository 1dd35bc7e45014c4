"""Mixing documents by weight and packing them into blocks: pure functions on anything that has a length."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32

Item = TypeVar("Item", bound=Sized)


@dataclass
class Feed(Generic[Item]):
    """One source in a mix, and how much of it has been used."""

    name: str
    """Named in errors."""
    share: float
    """Wanted share of the mix's length."""
    restart: Callable[[], Iterator[Item]]
    """Gives the source's documents from the first one on."""
    taken: int = 0
    """Length used so far."""
    passes: int = 0
    """How often the source has been read to its end."""
    _items: Iterator[Item] = field(init=False, repr=False)
    head: Item = field(init=False, repr=False)
    """The next document."""

    def start(self) -> None:
        """Go to the first document; ValueError where there is none."""
        self._items = self.restart()
        if not self.advance():
            raise ValueError(f"corpus {self.name!r} gave no document; remove it from the spec or fill it")

    def advance(self) -> bool:
        """Go to the next document; False where there is none."""
        head = next(self._items, None)
        if head is None:
            return False
        self.head = head
        return True


def mix(feeds: Sequence[Feed[Item]], budget: int, *, repeat: bool) -> Iterator[tuple[int, Item]]:
    """Yield (feed number, document) up to `budget`, keeping the feeds' lengths close to their shares.

    Next comes the feed that would be least ahead of its share halfway through its next document, so none is
    ever ahead by much more than half a document. With `repeat`, a feed that ends is read again until every
    feed has ended once; without, it stays out, and none gets more than its share of the budget.

    Raises:
        ValueError: a feed without a document.
    """
    for feed in feeds:
        feed.start()
    live = list(range(len(feeds)))
    total = 0
    while live:
        number = min(live, key=lambda i: (feeds[i].taken + len(feeds[i].head) / 2) / feeds[i].share)
        feed = feeds[number]
        total += len(feed.head)
        feed.taken += len(feed.head)
        yield number, feed.head
        if total >= budget:
            return
        if not feed.advance():
            feed.passes += 1
            if not repeat:
                live.remove(number)
            elif all(other.passes for other in feeds):
                return
            else:
                feed.start()
        elif not repeat and feed.taken >= feed.share * budget:
            live.remove(number)


class Packed(NamedTuple):
    """A stream cut into blocks."""

    blocks: Int32[np.ndarray, "block n_ctx"]
    """The stream in order, less what does not fill a block."""
    tokens: list[int]
    """Per source, how many of the blocks' tokens are its."""
    documents: list[int]
    """Per source, how many documents begin in the blocks."""


def pack(stream: Iterable[tuple[int, Sequence[int]]], n_ctx: int, budget: int, n_sources: int) -> Packed:
    """Join the documents of `stream` and cut the first `budget` ids into blocks of `n_ctx`.

    `stream` yields (source number, ids) and must stop by itself.
    """
    joined = array("i")
    owners: list[tuple[int, int]] = []
    for number, ids in stream:
        joined.extend(ids)
        owners.append((number, len(ids)))
    left = min(len(joined), budget) // n_ctx * n_ctx
    blocks = np.frombuffer(joined, dtype=np.int32)[:left].reshape(-1, n_ctx)
    tokens, documents = [0] * n_sources, [0] * n_sources
    for number, length in owners:
        if left == 0:
            break
        used = min(length, left)
        tokens[number] += used
        documents[number] += 1
        left -= used
    return Packed(blocks, tokens, documents)
