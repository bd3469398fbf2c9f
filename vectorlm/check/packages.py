"""Is what the configuration needs installed, and can this torch use the GPUs asked for? Floor 1,
called by `everything`. Nothing is imported: names and versions stand in the packages' papers.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from vectorlm.check import libraries
from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.config.schema import Config

_NO_BF16 = re.compile(r"v100|p100|p40|p4\b|t4\b|k80|k40|m40|rtx[_-]?20|rtx[_-]?[568]000$|titan|gtx")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)")


def look(here: Surroundings) -> Iterator[Finding]:
    elsewhere = here.other_environment
    kind = error
    if elsewhere:
        text = "the job's Python may be another one than this, which is looked at here"
        yield note(elsewhere, text, "to be sure, run vectorlm check in that environment")
        kind = warning
    for key, package, cure in _wanted(here.config):
        if libraries.package_folder(package) is None:
            yield kind(key, f"{package} is not installed", cure)
    yield from _versions()
    yield from _torch(here)
    yield from _bf16(here)
    yield from _without_effect(here)


def _wanted(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, package, cure) of what only some configurations need."""
    if config.enable_wandb_logging:
        yield "enable_wandb_logging", "wandb", "pip install 'vectorlm[wandb]', or set it to false"
    if config.enable_tensorboard_logging:
        cure = "pip install 'vectorlm[tensorboard]', or set it to false"
        yield "enable_tensorboard_logging", "tensorboard", cure
    if config.train_parameters.lora_peft_config is not None:
        yield "train_parameters.lora_peft_config", "peft", "pip install peft"
    if config.slurm and config.slurm.launcher == "submitit":
        yield "slurm.launcher", "submitit", "pip install submitit, or set launcher: sbatch"
    for package in ("torch", "transformers"):
        yield package, package, "install VectorLM's requirements: pip install vectorlm"


def _versions() -> Iterator[Finding]:
    """Of what VectorLM itself requires."""
    try:
        required = importlib.metadata.requires("vectorlm") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in required:
        match = _REQUIREMENT.match(line)
        if "extra ==" in line or match is None:
            continue
        name, limits = match[1], match[2]
        there = libraries.version(name)
        if there is None:
            continue
        least = re.search(r">=\s*([\d.]+)", limits)
        below = re.search(r"<\s*([\d.]+)", limits)
        too_old = least is not None and libraries.older(there, least[1])
        too_new = below is not None and not libraries.older(there, below[1])
        if too_old or too_new:
            text = f"{there} is installed, and VectorLM is made for {limits.strip()}"
            yield warning(name, text, f"pip install '{name}{limits.strip()}'")


def _torch(here: Surroundings) -> Iterator[Finding]:
    build = libraries.torch_build()
    if not here.uses_gpus or build is None or here.other_environment:
        return
    if not build.get("cuda") and not build.get("hip"):
        yield warning(
            "slurm.gpus_per_node",
            f"torch {build.get('__version__')} is built without CUDA: the job would take the GPUs "
            "and compute on the CPU",
            "install a build for GPUs, see pytorch.org; or set gpus_per_node: 0",
        )


def _bf16(here: Surroundings) -> Iterator[Finding]:
    precision = here.config.train_parameters.effective_precision
    kind = here.config.slurm.gpu_type if here.config.slurm else None
    if kind and precision.startswith("bf16") and _NO_BF16.search(kind.lower()):
        key = "precision" if here.config.train_parameters.precision else "use_mp"
        yield error(
            f"train_parameters.{key}",
            f"{precision}: {kind} has no bf16",
            "use `precision: 16-mixed`, and leave use_mp out",
        )


def _without_effect(here: Surroundings) -> Iterator[Finding]:
    train, slurm = here.config.train_parameters, here.config.slurm
    if train.reduce_dtype == "compute" and train.effective_precision == "32-true":
        yield note(
            "train_parameters.reduce_dtype",
            "compute is float32 already with precision 32-true, so the key changes nothing",
            "leave it out, or choose a shorter precision, such as bf16-mixed",
        )
    if train.use_liger_kernel and slurm is not None and not slurm.gpus_per_node:
        yield note(
            "train_parameters.use_liger_kernel",
            "its kernels need an NVIDIA GPU, and slurm.gpus_per_node is 0: training would refuse",
            "set it to false, or ask for GPUs",
        )
