import os

import pytest

# Set before the kernels are imported, which read it: Triton's interpreter runs them on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

from atod_kernels import products  # noqa: E402
from atod_kernels.torch import backend as torch_backend  # noqa: E402


@pytest.fixture
def flops(monkeypatch):
    """FLOPs of the matrix products of atod_kernels, counted."""
    count = [0]
    product = products.product

    def counted(a, b, out, add=False):
        count[0] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return product(a, b, out, add)

    for module in (products, torch_backend):
        monkeypatch.setattr(module, "product", counted)
    return count
