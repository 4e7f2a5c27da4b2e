"""Packages that an operation may use and that need not be installed."""

import functools
import importlib.metadata
import importlib.util


@functools.cache
def is_importable(module: str) -> bool:
    """Whether a module is there; the packages above it are imported, the module itself is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # no such package, one without this part, or one built for another torch
        return False


@functools.cache
def is_installed(distribution: str) -> bool:
    """Whether pip knows a distribution; packages of several distributions may share a folder."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
