"""What runs measured, against what was planned: a factor for each type of GPU. Floor 1, used by
`outlook`, written by `plan --calibrate`.

Kept in the user's own state folder: other people's machines, drivers and libraries differ.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vectorlm.errors import VectorLMError
from vectorlm.files import write_synced
from vectorlm.plan.gpus import Gpu

NAME = "calibration.json"
MOST_RUNS = 20  # of each GPU that count, the newest
# A factor outside of this is a mistake, such as another run on the same GPU.
SMALLEST, LARGEST = 0.7, 1.4


def path(environ: Mapping[str, str] = os.environ) -> Path:
    state = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(os.path.expanduser(state)) / "vectorlm" / NAME


def correction(gpu: Gpu) -> float | None:
    """Measured / planned on this type of GPU, the median of its runs; None where there are none."""
    found = _read().get(gpu.name)
    ratios = [entry["ratio"] for entry in found or [] if _sound(entry)]
    return statistics.median(ratios) if ratios else None


def record(gpu: Gpu, run: str, planned_bytes: int, measured_bytes: int) -> float:
    """Store what a run says of this GPU; returns measured / planned."""
    ratio = measured_bytes / planned_bytes
    if not SMALLEST <= ratio <= LARGEST:
        raise VectorLMError(
            f"plan --calibrate: {run} held {measured_bytes / 2**30:.2f} GiB where "
            f"{planned_bytes / 2**30:.2f} GiB were planned; that is too far off to be a matter of "
            "the machine. Does its configuration belong to it, and did its longest rows come?"
        )
    known = _read()
    others = [entry for entry in known.get(gpu.name, []) if entry.get("run") != run]
    known[gpu.name] = [*others, {"run": run, "ratio": round(ratio, 4)}][-MOST_RUNS:]
    _write(known)
    return ratio


def _sound(entry: Any) -> bool:
    ratio = entry.get("ratio") if isinstance(entry, dict) else None
    return isinstance(ratio, int | float) and SMALLEST <= ratio <= LARGEST


def _read() -> dict[str, list[dict[str, Any]]]:
    """Nothing where the file is not there or damaged: a plan goes on without it."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: runs for name, runs in content.items() if isinstance(runs, list)}


def _write(known: dict[str, list[dict[str, Any]]]) -> None:
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = target.with_name(f".{NAME}.{os.getpid()}")
        write_synced(unfinished, json.dumps(known, indent=1))
        os.replace(unfinished, target)
    except OSError as error:
        raise VectorLMError(
            f"plan --calibrate: {target} cannot be written: {error}; make room in your home, or "
            "set XDG_STATE_HOME"
        ) from error
