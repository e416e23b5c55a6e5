"""One install for both packages: `atod_fast` (the trainer) and `atod_kernels` (stand-alone operators, sources in kernels/)."""

from pathlib import Path

from setuptools import find_packages, setup

# What WebShop and Search-QA look things up with.
SEARCH = ["bm25s>=0.3,<0.4", "PyStemmer>=2.2", "rapidfuzz>=3", "tenacity>=9", "urllib3>=2.2"]
# What wraps environments of other interfaces.
GYM, OPENENV = ["gymnasium>=1.0"], ["websockets>=15"]

setup(
    name="atod_fast",
    version="0.1.0",
    description="Annealed turn-aware on-policy distillation of small language-model agents, with exact fused divergence kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["atod_fast", "atod_fast.*"]) + ["atod_kernels"],
    package_dir={"": ".", "atod_kernels": "kernels/atod_kernels"},
    package_data={"atod_fast": ["presets/*.toml", "demo/weights/*/*", "demo/weights/*/*/*", "envs/alfworld/data/*"], "atod_kernels": ["*.json"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16.1,<5.20",
        "safetensors>=0.6",
        "numpy>=1.26",
        "pydantic>=2.10",
        "rich>=13",
        "tomli-w>=1.1",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "triton>=3.6; sys_platform == 'linux'", *SEARCH, *GYM, *OPENENV],
        "search": SEARCH,
        "gym": GYM,
        "openenv": OPENENV,
        "vllm": ["vllm==0.32.*", "accelerate>=1.1"],
        "cuda": ["flash-attn>=2.8", "liger-kernel>=0.8"],
        "alfworld": ["alfworld==0.4.2"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0,<2", "latex2mathml>=3.77,<4", "ruff>=0.9"],
        "peers": ["trl>=1.16,<2", "liger-kernel>=0.8.5,<0.9"],
    },
)
