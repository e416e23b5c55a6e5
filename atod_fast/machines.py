"""Named GPUs and how many of them a run has: what `--on 8xh100` and `--on 2x8xh100` mean."""

from __future__ import annotations

import re
from dataclasses import dataclass

from atod_fast.config.settings import did_you_mean
from atod_fast.errors import UserError

# Shares of the published peaks that a step reaches. The first two are fitted to the two scoring phases of
# bench/results/gpu_step.json (H100); the third is assumed.
PRODUCTS, BANDWIDTH, LINK = 0.52, 0.60, 0.70


@dataclass(frozen=True, slots=True)
class GPU:
    """What one GPU reaches in training, per second; links one way."""

    title: str
    memory: int  # bytes
    products: float  # FLOP of dense matrix products in 16 bits
    bandwidth: float  # bytes of its memory
    link: float  # bytes to the other GPUs of its node
    network: float  # bytes to other nodes
    decode_layer: float  # seconds a layer of a decode step in the transformers engine, beside its products


def _gpu(title: str, gib: float, products: float, bandwidth: float, link: float, network: float = 50e9) -> GPU:
    # 28 layers of an eager decode step took 44 ms on an H100 (gpu_step.json): the host's time, whatever the GPU.
    return GPU(title, int(gib * 2**30), PRODUCTS * products, BANDWIDTH * bandwidth, LINK * link, LINK * network, 1.5e-3)


# Peaks: NVIDIA's data sheets (SXM; dense bf16); memory as the driver reports it; network: an adapter of 400 Gbit/s a
# GPU, 200 for the A100.
GPUS = {
    "a100": _gpu("A100 80GB", 79.2, 312e12, 2.04e12, 300e9, 25e9),
    "h100": _gpu("H100 80GB", 79.2, 989e12, 3.35e12, 450e9),
    "h200": _gpu("H200 141GB", 139.8, 989e12, 4.8e12, 450e9),
    "b200": _gpu("B200 180GB", 178.3, 2250e12, 8.0e12, 900e9),
}


@dataclass(frozen=True, slots=True)
class Machines:
    """`nodes` nodes of `per_node` GPUs of one kind."""

    gpu: GPU
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        each = f"{self.per_node} x {self.gpu.title}"
        return each if self.nodes == 1 else f"{self.nodes} nodes of {each}"


_MACHINES = re.compile(r"(?:(?P<nodes>\d{1,4})x)?(?P<count>\d{1,4})x(?P<gpu>[a-z0-9-]+)")


def parse(text: str) -> Machines:
    """Return the machines that `[NODESx]COUNTxGPU` names. Raises UserError for another form or an unknown GPU."""
    found = _MACHINES.fullmatch(text.lower())
    if not found:
        raise UserError(f"--on {text}: write [NODESx]COUNTxGPU, as 8xh100 or 2x8xh100; GPUs: {', '.join(GPUS)}")
    nodes, count = int(found["nodes"] or 1), int(found["count"])
    if not nodes or not count:
        raise UserError(f"--on {text}: the number of nodes and of GPUs is at least 1")
    if found["gpu"] not in GPUS:
        hint = did_you_mean(found["gpu"], GPUS)
        raise UserError(f"--on {text}: {found['gpu']} is not a GPU known here ({', '.join(GPUS)}){hint}")
    return Machines(GPUS[found["gpu"]], nodes, count)
