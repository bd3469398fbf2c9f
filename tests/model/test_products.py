"""oneDNN's products are torch's, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product as every
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vectorlm.model import products
from vectorlm.model.products import linear, product, take_onednn

needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="a CPU without AVX-512")


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def matrix(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    if transposed:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(("left", "right"), [*every([False, True], repeat=2)])
@pytest.mark.parametrize("sizes", [(7, 5, 3), (1, 5, 1), (4, 1, 4), (0, 5, 3), (4, 0, 3)])
def test_products_of_any_layout_and_size(
    sizes: tuple[int, int, int], left: bool, right: bool
) -> None:
    a, b = matrix(sizes[0], sizes[1], left), matrix(sizes[1], sizes[2], right)
    torch.testing.assert_close(product(a, b), a @ b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    a, b = matrix(7, 5, False).to(dtype), matrix(5, 3, False).to(dtype)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(linear(a, b.t()), a @ b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (0, 8)])
def test_layers_learn_the_same(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(3)
    plain, other = nn.Linear(8, 5, bias=bias), nn.Linear(8, 5, bias=bias)
    other.load_state_dict(plain.state_dict())
    take_onednn(other)
    results = []
    for layer in (plain, other):
        given = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        output = layer(given)
        output.square().sum().backward()
        results.append([output, given.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0])


@needs_onednn
def test_all_three_products_of_a_layer_are_onednns() -> None:
    layer = nn.Linear(8, 5)
    take_onednn(layer)
    with Operations() as seen:
        layer(torch.randn(6, 8, requires_grad=True)).sum().backward()
    assert "mkldnn._linear_pointwise" in seen.names
    assert not {"aten.mm", "aten.addmm"} & seen.names


def test_a_frozen_layer_gets_no_gradient() -> None:
    layer = nn.Linear(8, 5).requires_grad_(False)
    take_onednn(layer)
    given = torch.randn(6, 8, requires_grad=True)
    layer(given).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(given.grad, layer.weight.sum(0).expand(6, 8))


# --- what is kept -------------------------------------------------------------------------------

GROWTH = """
import torch
from vectorlm.model.products import keep_few_kernels
{first}
def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
weight = torch.randn(128, 128, dtype=torch.bfloat16)
rows = torch.randn(700, 128, dtype=torch.bfloat16)
rows @ weight
before = resident_mib()
for count in range(100, 700):
    rows[:count] @ weight
print(resident_mib() - before)
"""


def grown_mib(first: str) -> float:
    """By products of 600 shapes."""
    command = [sys.executable, "-c", GROWTH.format(first=first)]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in products.KEPT}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return float(done.stdout)


@needs_onednn
def test_batches_of_ever_other_lengths_do_not_fill_memory() -> None:
    assert grown_mib("pass") > 200  # guards the comparison
    assert grown_mib("keep_few_kernels()") < 100
