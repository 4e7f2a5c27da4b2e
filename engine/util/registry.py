"""Registry: what a configuration chooses by name is the entry of the module with that name.

    optimizer.kind muon -> millrace.engine.optim.muon.ENTRY

A new choice is a new module with an `ENTRY`, its name in the configuration's `Literal`, and the JSON Schema
that `make schema` writes. Modules are imported when they are asked for: the configuration needs none of them.
"""

import importlib
from typing import Any


def entry(package: str, name: str) -> Any:
    """`ENTRY` of module `name` in `package` of the engine, e.g. entry("optim", "muon")."""
    return importlib.import_module(f"millrace.engine.{package}.{name}").ENTRY
