"""Products of matrices on the CPU. Floor 2, called by `load` and `loss`.

torch gives them to MKL, which keeps its fastest code for Intel's CPUs; oneDNN, which is in torch as
well, is about twice as fast on others with AVX-512, and as fast on Intel's. Tensors of 16 bits go
to oneDNN without being asked.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

# Of oneDNN, and of what torch lays around it. A step has products of about thirty shapes.
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


@cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
        "AVX512",
        "AVX512_VNNI",
    )


def keep_few_kernels() -> None:
    """A kernel is made for each shape and takes about a megabyte; by default 1024 of them are kept,
    twice. Micro-batches of other lengths have other shapes. Before the first product.
    """
    for name, count in KEPT.items():
        os.environ.setdefault(name, count)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, of two matrices; its memory may lie transposed."""
    if not _takes(a):
        return a @ b
    if a.is_contiguous():
        return _onednn(a, b.t())
    return _onednn(b.t(), a).t()  # the left one is copied if it is not contiguous


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As torch's, without gradients."""
    if not _takes(input):
        return functional.linear(input, weight, bias)
    return _onednn(input, weight, bias)


def take_onednn(model: nn.Module) -> None:
    """Layers in 32 bits on the CPU compute by it, forward and backward."""
    for layer in model.modules():
        if type(layer) is nn.Linear and _takes(layer.weight) and "forward" not in vars(layer):
            layer.forward = partial(_by_onednn, layer)  # type: ignore[method-assign]


def _by_onednn(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _Linear.apply(input, layer.weight, layer.bias))


def _takes(tensor: torch.Tensor) -> bool:
    """It has no product of nothing with nothing."""
    wide_on_cpu = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return wide_on_cpu and tensor.numel() > 0 and has_onednn()


def _onednn(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        input, weight = ctx.saved_tensors
        gradient = outer[0].flatten(0, -2)
        wanted = ctx.needs_input_grad
        of_input = product(gradient, weight).view_as(input) if wanted[0] else None
        of_weight = product(gradient.t(), input.flatten(0, -2)) if wanted[1] else None
        of_bias = gradient.sum(0) if wanted[2] else None
        return of_input, of_weight, of_bias
