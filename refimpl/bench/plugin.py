"""A person's own method: a class that stands outside of the tree and meets an arena's cells."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from refimpl.bench.cells import Plugin, combinations


def load_object(reference: str) -> Any:
    """The object of `module:Object`; modules of the current directory can be imported, as with `python -m`.

    Raises:
        ValueError: it is not of that form, or there is no such module or object.
    """
    module, colon, name = reference.partition(":")
    if not (module and colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{reference!r} must be package.module:Class")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{reference!r}: {module} needs {error.name}, which is not installed") from error
        raise ValueError(
            f"{reference!r}: no module {error.name!r} in {Path.cwd()} or among what is installed"
        ) from error
    except Exception as error:  # its own code, at import
        raise ValueError(f"{reference!r}: importing {module} raised {type(error).__name__}: {error}") from error
    try:
        return getattr(found, name)
    except AttributeError:
        classes = sorted(key for key, value in vars(found).items() if isinstance(value, type))
        raise ValueError(
            f"{reference!r}: {module} has no {name!r}; its classes: {', '.join(classes) or 'none'}"
        ) from None


def open_plugin(reference: str) -> Plugin:
    """A plugin with its grid of settings, from the class attribute `ARENA`; without one it runs with its defaults.

    Raises:
        ValueError: there is no such class, its grid is not lists of JSON values, or it can't be made with one of them.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    cls = load_object(reference)
    if not isinstance(cls, type):
        raise ValueError(f"{reference!r} is a {type(cls).__name__}; give a class, which is called with its settings")
    grid = getattr(cls, "ARENA", {})
    try:
        grid = json.loads(json.dumps(grid, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{reference}.ARENA is not made of JSON values: {error}") from error
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{reference}.ARENA must be {{'setting': [value, …]}}, got {grid!r}")
    for settings in combinations(grid):
        try:
            cls(**settings)
        except Exception as error:  # its own code: whatever it raises is what its author must see
            said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise ValueError(f"{reference}({said}) raised {type(error).__name__}: {error}") from error
    return Plugin(name=reference, grid=grid)
