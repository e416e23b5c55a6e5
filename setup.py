"""Build `atod_fast`, whose metadata is in pyproject.toml. `atod_kernels` is built from kernels/."""

from setuptools import setup

setup()
