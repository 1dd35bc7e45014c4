"""Public names of a package that are imported on first use, so that importing the package costs nothing (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: by module, the names that it has from there, and `__version__`."""
    home = {name: module for module, names in modules.items() for name in names.split()}
    home["__version__"] = "sparse_model.version"

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return get
