"""Packaging that `pyproject.toml` cannot express: the folders install below `millrace`, because Hugging Face
publishes a package named `kernels`, which ours must neither shadow nor be shadowed by."""

from setuptools import find_packages, setup

FOLDERS = ("engine", "kernels", "benchmarks")

packages = [
    name for folder in FOLDERS for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
]

setup(
    packages=[f"millrace.{name}" for name in (*packages, "configs", "configs.models")],
    package_dir={f"millrace.{folder}": folder for folder in (*FOLDERS, "configs")},
    package_data={
        "millrace.benchmarks": ["published.json"],
        "millrace.configs": ["*.json"],
        "millrace.configs.models": ["*.json"],
        "millrace.engine.data.sources": ["*.json"],
        "millrace.engine.planning": ["*.json"],
        "millrace.kernels": ["*.so"],
        "millrace.kernels.support": ["*.json"],
    },
)
