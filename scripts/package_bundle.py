"""Copy what interventions need of a finished run into the package, where load_dense finds it by name.

Example:
    python scripts/package_bundle.py --run runs/bundle --name demo
"""

from dataclasses import dataclass

import tyro

from interventions.bundle.packaged import FOLDER
from interventions.cli.options import report_errors
from interventions.packaging import package_run
from sparse_model.config import require


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copy what interventions need of a finished run into the package, where load_dense finds it by name."""

    run: str
    """Run folder, with its channels named."""
    name: str = "demo"
    """Name of the bundle: load_dense(NAME)."""


def main(options: Options) -> None:
    require(options.name.isidentifier(), "name", options.name, "use letters, digits and _")
    out = package_run(options.run, FOLDER / options.name)
    size = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"bundle {options.name}: {size / 2**20:.2f} MB of at most 8; load_dense({options.name!r})")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options, description=__doc__))
