"""Share a finished run on the Hugging Face hub, whole and with a card of its figures.

Example:
    sparse-bridges push --run runs/demo --to owner/name --private
"""

from dataclasses import dataclass
from typing import Literal

from interventions.cli.options import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Share a finished run on the Hugging Face hub, whole and with a card of its figures."""

    run: str = "runs/demo"
    """Run folder."""
    to: str
    """Name on the hub, owner/name: what load_dense takes afterwards."""
    private: bool = False
    """Make a new repository that only you see."""
    revision: str | None = None
    """Branch to push to, made where there is none."""
    dense: Literal["inside", "reference"] = "inside"
    """Send the dense model, or only its name on the hub, commit and digest."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "push", arguments))


def main(options: Options) -> None:
    from interventions.sharing.push import push_to_hub

    private, revision = options.private or None, options.revision
    url = push_to_hub(options.run, options.to, private=private, revision=revision, dense=options.dense)
    said = "" if revision is None else f", revision={revision!r}"
    print(f"pushed: {url}\nload it with load_dense({options.to!r}{said})")
