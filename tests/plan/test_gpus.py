"""GPUs by the names that people, Slurm and drivers use."""

from __future__ import annotations

import pytest

from vectorlm.plan.flops import peak_flops
from vectorlm.plan.gpus import GIB, KNOWN, find_gpu


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a100", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("a100_80gb", "A100-80GB"),
        ("A100-40", "A100-40GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("a100_40gb", "A100-40GB"),
        ("gpu:a100", "A100-80GB"),
        ("v100", "V100-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("v100-32", "V100-32GB"),
        ("v100_16gb", "V100-16GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("rtx3090", "RTX 3090"),
        ("rtx_4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA A30", "A30"),
        ("a40", "A40"),
        ("NVIDIA L40S", "L40S"),
        ("l40", "L40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h100", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI250X", "MI250"),
        ("mi300x", "MI300X"),
        ("rtx_a6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_names(text: str, name: str) -> None:
    gpu = find_gpu(text)
    assert gpu
    assert gpu.name == name


@pytest.mark.parametrize("text", ["", "gpu", "a1000", "k80", "GTX 1080", "cpu", "tpu"])
def test_others_are_not_known(text: str) -> None:
    assert find_gpu(text) is None


def test_a_part_of_a_gpu_is_no_whole_one() -> None:
    part, whole = find_gpu("a100_3g.20gb"), find_gpu("a100")
    assert part
    assert whole
    assert part.name == "A100 3g.20gb"
    assert 19 * GIB < part.memory_bytes < 20 * GIB
    assert part.half_tflops == pytest.approx(whole.half_tflops * 3 / 7)
    assert find_gpu("1g.10gb") is None


@pytest.mark.parametrize(
    ("text", "assumed"),
    [
        ("a100", "A100-40GB"),
        ("v100", "V100-32GB"),
        ("a100-80", ""),
        ("v100-32gb", ""),
        ("h100", ""),
    ],
)
def test_what_a_name_leaves_open_is_said(text: str, assumed: str) -> None:
    gpu = find_gpu(text)
    assert gpu
    assert bool(gpu.assumed) == bool(assumed)
    assert assumed in gpu.assumed


def test_every_name_of_the_table_finds_itself() -> None:
    for name in KNOWN:
        gpu = find_gpu(name)
        assert gpu, name
        assert gpu.name == name


def test_memory_is_less_than_the_name_says() -> None:
    gpu = find_gpu("A100-80GB")
    assert gpu
    assert 78 * GIB < gpu.memory_bytes < 80 * GIB


def test_precision_decides_on_the_peak() -> None:
    gpu = find_gpu("a100")
    assert gpu
    assert gpu.peak_flops("32-true") == 19.5e12
    assert gpu.peak_flops("bf16-mixed") == peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("abacus") is None
    v100 = find_gpu("v100")
    assert v100
    assert not v100.has_bf16
