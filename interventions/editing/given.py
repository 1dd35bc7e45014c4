"""What callers may give to `intervene`, for editors and type checkers.

At run time these are Any: what does not fit is refused by a sentence of the argument's own, also where every other
annotation is enforced, as in the tests.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence, Set
    from typing import TypeAlias

    import numpy as np
    from torch import Tensor

    from bridges.sites import Site
    from interventions.bundle.channels import Channel
    from interventions.editing.positions import Steps
    from interventions.editing.units import Units
    from interventions.editing.where import Where

    AnyChannel: TypeAlias = str | Channel
    Channels: TypeAlias = AnyChannel | Sequence[AnyChannel] | Set[AnyChannel] | Mapping[str, float]
    Number: TypeAlias = int | float | np.number | Tensor
    Amount: TypeAlias = Number | Sequence[float] | np.ndarray
    Tokens: TypeAlias = Tensor | np.ndarray | Sequence[Sequence[int]]
    Positions: TypeAlias = int | slice | Iterable[int] | np.ndarray | Tensor | Callable[[Tensor], Any]
    AnySite: TypeAlias = int | str | Site
    Vector: TypeAlias = Tensor | np.ndarray | Sequence[float]
else:
    AnyChannel = Channels = Number = Amount = Tokens = Positions = AnySite = Vector = Steps = Units = Where = Any
