"""Build `atod_fast`: metadata in pyproject.toml, version in atod_fast/__init__.py. `atod_kernels` is built from kernels/."""

from setuptools import setup

setup()
