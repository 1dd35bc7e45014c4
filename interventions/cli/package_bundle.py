"""Copy what interventions need of a finished run into the package, where load_dense finds it by name.

Example:
    sparse-bridges package-bundle --run runs/bundle --name demo
"""

from dataclasses import dataclass

from interventions.cli.options import parse
from sparse_model.config import require


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copy what interventions need of a finished run into the package, where load_dense finds it by name."""

    run: str
    """Run folder, with its channels named."""
    name: str = "demo"
    """Name of the bundle: load_dense(NAME)."""


def command(arguments: list[str]) -> None:
    main(parse(Options, "package-bundle", arguments))


def main(options: Options) -> None:
    require(options.name.isidentifier(), "name", options.name, "use letters, digits and _")
    from bridges.packaged import FOLDER
    from interventions.sharing.packaging import package_run
    from sparse_model.io.atomic import check_writable

    check_writable(FOLDER / options.name)
    out = package_run(options.run, FOLDER / options.name)
    size = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"bundle {options.name}: {size / 2**20:.2f} MB of at most 20; load_dense({options.name!r})")
