"""Build `atod_fast`. Its metadata is in pyproject.toml, its version in atod_fast/__init__.py; `atod_kernels` is built from kernels/."""

from setuptools import setup

setup()
