"""How long a sequence may be."""


def check_length(length: int, n_ctx: int) -> None:
    """Raise ValueError for a sequence longer than the context."""
    if length > n_ctx:
        raise ValueError(f"the sequence has {length} tokens but the model's context holds {n_ctx}: shorten it")
