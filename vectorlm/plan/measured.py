"""What a run on GPUs measured of its memory, from its own folder. Floor 1, read for
`plan --calibrate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError
from vectorlm.plan.gpus import GIB, Gpu, find_gpu
from vectorlm.plan.outlook import Hardware, planned_for

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    config: Config
    hardware: Hardware
    peak_bytes: int


def read_run(folder: Path, gpu: Gpu | None) -> Run:
    """The highest memory that the run logged; its configuration as its newest checkpoint has it."""
    if not folder.is_dir():
        raise ConfigError(
            f"plan --calibrate: {folder} is not a folder here; give the output_dir of a run that "
            "has logged a step on a GPU"
        )
    measured = [line["memory_gib"] for line in _lines(folder / METRICS) if "memory_gib" in line]
    if not measured:
        raise ConfigError(
            f"plan --calibrate: {folder / METRICS} holds no memory_gib; give the output_dir of a "
            "run that has logged a step on a GPU"
        )
    state = _newest_state(folder)
    try:
        config = Config.model_validate_json(json.dumps(state["config"]))
        ranks = int(state["world"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ConfigError(
            f"plan --calibrate: {folder} has no checkpoint whose state.json tells its "
            "configuration; calibrate with a run that has saved one"
        ) from error
    gpu = gpu or _gpu(folder) or planned_for(config).gpu
    if gpu is None:
        raise ConfigError(
            f"plan --calibrate: {folder} does not say on which GPU it ran; add --gpu NAME"
        )
    per_node = min(config.slurm.ranks_per_node if config.slurm else ranks, ranks)
    return Run(config, Hardware(gpu, ranks, per_node), int(max(measured) * GIB))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that can be read; a crash may have cut off the last one."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [line for line in map(_parsed, texts) if isinstance(line, dict)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _newest_state(folder: Path) -> dict[str, Any]:
    for path in sorted((folder / "checkpoints").glob("step_*/state.json"), reverse=True):
        try:
            content = _parsed(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _gpu(folder: Path) -> Gpu | None:
    """As the preflight found it, where there was one."""
    try:
        report = json.loads((folder / "preflight.json").read_text(encoding="utf-8"))
        return find_gpu(str(report["facts"][0]["device"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
