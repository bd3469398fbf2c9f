"""GPUs by the names that people, Slurm and drivers give them. Floor 1, the one table of them.

Memory is what torch finds of it, less than the name says. Speeds are the vendors' dense peaks,
without sparsity; links are what a GPU sends to others of its node at best, a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vectorlm.config.schema import Precision

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """`half_tflops`: bf16, or fp16 where there is no bf16; `full_tflops`: 32 bits as torch takes
    them by default, without TF32. `assumed`: what a name left open, and how it was taken."""

    name: str
    memory_bytes: int
    half_tflops: float
    full_tflops: float
    bandwidth_bytes: float
    link_bytes: float
    has_bf16: bool = True
    assumed: str = ""

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("MI")

    def peak_flops(self, precision: Precision) -> float:
        return 1e12 * (self.full_tflops if precision == "32-true" else self.half_tflops)


def _gpu(
    name: str,
    memory_gib: float,
    half: float,
    full: float,
    bandwidth_gb: float,
    link_gb: float,
    has_bf16: bool = True,
) -> Gpu:
    memory = int(memory_gib * GIB)
    return Gpu(name, memory, half, full, bandwidth_gb * 1e9, link_gb * 1e9, has_bf16)


# A pattern for the name without blanks and dashes in small letters; the first that is found counts.
_GPUS: tuple[tuple[str, Gpu], ...] = (
    ("b200", _gpu("B200", 178.3, 2250, 80, 8000, 700)),
    ("gh200", _gpu("GH200", 94.5, 989, 67, 4000, 360)),
    ("h200", _gpu("H200", 139.8, 989, 67, 4800, 360)),
    ("h100nvl", _gpu("H100 NVL", 93.1, 835, 60, 3900, 250)),
    ("h100pcie", _gpu("H100 PCIe", 79.1, 756, 51, 2000, 40)),
    ("h100", _gpu("H100", 79.1, 989, 67, 3350, 360)),
    (r"a100(?!0).*40", _gpu("A100-40GB", 39.4, 312, 19.5, 1555, 230)),
    (r"a100(?!0)", _gpu("A100-80GB", 79.2, 312, 19.5, 2039, 230)),
    (r"rtxa6000|a6000", _gpu("RTX A6000", 47.5, 155, 38.7, 768, 20)),
    ("6000ada", _gpu("RTX 6000 Ada", 47.4, 364, 91, 960, 20)),
    (r"a40(?!\d)", _gpu("A40", 44.4, 150, 37.4, 696, 20)),
    (r"a30(?!\d)", _gpu("A30", 23.5, 165, 10.3, 933, 20)),
    (r"a10g?(?!\d)", _gpu("A10", 22.0, 125, 31.2, 600, 20)),
    ("l40s", _gpu("L40S", 44.4, 362, 91.6, 864, 20)),
    (r"l40(?!\d)", _gpu("L40", 44.4, 181, 90.5, 864, 20)),
    (r"l4(?!\d)", _gpu("L4", 22.0, 121, 30.3, 300, 20)),
    ("4090", _gpu("RTX 4090", 23.5, 165, 82.6, 1008, 16)),
    ("3090", _gpu("RTX 3090", 23.6, 71, 35.6, 936, 16)),
    (r"v100.*32", _gpu("V100-32GB", 31.7, 125, 15.7, 900, 120, False)),
    ("v100", _gpu("V100-16GB", 15.8, 125, 15.7, 900, 120, False)),
    (r"t4(?!\d)", _gpu("T4", 14.6, 65, 8.1, 320, 10, False)),
    ("mi300", _gpu("MI300X", 191.5, 1307, 163, 5300, 350)),
    ("mi250", _gpu("MI250", 63.9, 191.5, 22.6, 1638, 100)),
)
# A part of a GPU (MIG), such as `a100_3g.20gb`: so many sevenths, and so much memory.
_PART = re.compile(r"([1-7])g\.(\d+)gb")
KNOWN = tuple(gpu.name for _, gpu in _GPUS)


def find_gpu(text: str) -> Gpu | None:
    """The GPU that a name means, or None. An A100 or H100 without a size has 80 GB, a V100 16."""
    plain = re.sub(r"[\s_\-]|nvidia|amd|tesla|geforce|instinct|sxm\d*", "", text.lower())
    part = _PART.search(plain)
    plain = _PART.sub("", plain)
    for pattern, gpu in _GPUS:
        # `ga100` and `gb200` are no names of these; a letter before one makes it another.
        if re.search(rf"(?<![a-z0-9])(?:{pattern})|(?:gpu|rtx|quadro|g)(?:{pattern})", plain):
            if part:
                return _slice(gpu, int(part[1]), int(part[2]))
            return replace(gpu, assumed=_assumed(gpu, text, plain))
    return None


def _slice(gpu: Gpu, sevenths: int, memory_gib: int) -> Gpu:
    share = sevenths / 7
    return replace(
        gpu,
        name=f"{gpu.name.partition('-')[0]} {sevenths}g.{memory_gib}gb",
        memory_bytes=int(0.97 * memory_gib * GIB),
        half_tflops=gpu.half_tflops * share,
        full_tflops=gpu.full_tflops * share,
        bandwidth_bytes=gpu.bandwidth_bytes * share,
    )


def _assumed(gpu: Gpu, text: str, plain: str) -> str:
    kind, _, size = gpu.name.partition("-")
    others = [name for name in KNOWN if name.startswith(f"{kind}-") and name != gpu.name]
    if not others or size.removesuffix("GB") in plain:
        return ""
    return f"{text} is taken for {gpu.name}; there is {others[0]}, too: name it with its size"
