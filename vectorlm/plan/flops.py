"""Floating-point work of a token. Floor 1, used for the MFU shown in training and for `plan`; what
GPUs can do in a second is in `gpus`.
"""

from __future__ import annotations

from vectorlm.plan.gpus import find_gpu


def peak_flops(gpu_name: str) -> float | None:
    """Peak of one GPU in FLOP/s in half precision, or None where it is not known."""
    gpu = find_gpu(gpu_name)
    return gpu.half_tflops * 1e12 if gpu else None


def train_flops_per_token(
    matmul_parameters: int, layers: int, hidden: int, mean_context: float, trains_all: bool
) -> float:
    """Forward and backward of one token; recomputation is not counted, as is usual for MFU.

    With frozen weights (LoRA) the backward pass needs no weight gradients: 4 instead of 6
    operations a parameter. A token sees half of its document on average, hence mean_context / 2.
    """
    per_parameter = 6 if trains_all else 4
    attention = 12 * layers * hidden * mean_context / 2
    return per_parameter * matmul_parameters + attention
