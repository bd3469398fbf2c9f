"""Floating-point work of a token, and what GPUs can do in a second. Floor 1, used for the MFU shown
in training.
"""

from __future__ import annotations

# Dense peaks by the vendors' data sheets, TFLOP/s in bf16 (fp16 where there is no bf16); longest
# names first.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("MI300", 1307.0),
    ("MI250", 383.0),
)


def peak_flops(gpu_name: str) -> float | None:
    """Peak of one GPU in FLOP/s, or None where it is not known."""
    for name, tflops in _PEAK_TFLOPS:
        if name.lower() in gpu_name.lower():
            return tflops * 1e12
    return None


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
