"""Packaging that `pyproject.toml` cannot express: the folders `engine/` and `kernels/` lie at the top of the
repository and install as `millrace.engine` and `millrace.kernels` (Hugging Face publishes a package named
`kernels`, which ours must neither shadow nor be shadowed by)."""

from setuptools import find_packages, setup

FOLDERS = ("engine", "kernels")

packages = [
    name for folder in FOLDERS for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
]

setup(
    packages=[f"millrace.{name}" for name in packages],
    package_dir={f"millrace.{folder}": folder for folder in FOLDERS},
    package_data={
        "millrace.engine.data.sources": ["*.json"],
        "millrace.kernels": ["*.so"],
        "millrace.kernels.support": ["*.json"],
    },
)
