"""Where a run begins: at the beginning, or at its newest sound checkpoint. Floor 3, used by
`assemble`.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from vectorlm.checkpoint import Checkpoints, read_state
from vectorlm.config.load import config_to_dict
from vectorlm.config.schema import Config, DatasetConfig
from vectorlm.dataset import Dataset
from vectorlm.distributed import Ranks
from vectorlm.errors import CheckpointError, ClusterError, ConfigError
from vectorlm.steps import Position, Steps


@dataclass(frozen=True)
class Start:
    """Where a run begins: at the beginning, or at a checkpoint."""

    steps: Steps
    position: Position
    steps_done: int
    folder: Path | None
    state: dict[str, Any]

    @property
    def total_steps(self) -> int:
        return self.steps_done + self.steps.remaining(self.position)


def claim(output_dir: str) -> tuple[IO[str] | None, str | None]:
    """Lock `output_dir` for this run, as long as the file is open; with a note if that is unsure.

    A lock that another machine holds may be that of a machine that died: it is told, not obeyed.
    """
    path = Path(output_dir) / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"train_parameters.output_dir: {output_dir} cannot be written ({error}); give "
            "another folder"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file, _held(file, output_dir)
    except OSError:
        return file, f"{path}: this file system has no locks; start one run at a time in it"
    with suppress(OSError):  # a full disk: the lock holds without a name
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}")
        file.flush()
    return file, None


def _held(file: IO[str], output_dir: str) -> str:
    file.seek(0)
    holder = file.read().split()
    if holder[:1] == [socket.gethostname()]:
        file.close()
        raise ClusterError(
            f"train_parameters.output_dir: {output_dir} is in use by a run on this machine "
            f"(process {holder[-1]}); wait for it, end it, or give another folder"
        )
    return f"{output_dir}: a run on {' '.join(holder[:1])} may still be using it"


def find_start(
    config: Config,
    dataset: DatasetConfig,
    data: Dataset,
    checkpoints: Checkpoints | None,
    ranks: Ranks,
) -> tuple[Start, list[str]]:
    """The beginning, or the newest sound checkpoint; with what the person should know about it."""
    train = config.train_parameters
    asked = dataset.train_bs * train.gradient_accumulation_steps * ranks.world
    fresh = Start(Steps(len(data.rows), asked, train.epochs), Position(), 0, None, {})
    if checkpoints is None:
        return fresh, []
    if ranks.first:
        checkpoints.remove_unfinished()
    found = checkpoints.find()
    notes = [f"skipped checkpoint {name}: {problem}" for name, problem in found.skipped.items()]
    if found.folder is None:
        return fresh, notes
    folder = found.folder
    state = ranks.together(lambda: read_state(folder))
    notes += _changes(config, data, state)
    batch = _global_batch(config, dataset, state, asked)
    steps = replace(fresh.steps, global_batch=batch)
    position = Position(state["epoch"], state["row"])
    if position.row >= len(data.rows):  # only after a change that was allowed
        position = Position(position.epoch + 1, 0)
    notes.append(
        f"resuming from {found.folder}: step {state['step']}, epoch {steps.epoch_at(position):.2f}"
    )
    if batch != asked:
        per_rank = math.ceil(batch / (dataset.train_bs * ranks.world))
        notes.append(
            f"the global batch stays {batch} rows, as on {state['world']} ranks: {per_rank} "
            "micro-batches a step now"
        )
    return Start(steps, position, state["step"], found.folder, state), notes


# A run that goes on with another one of these is not the run that was begun.
_FIXED = (
    "model",
    "train_parameters.seed",
    "train_parameters.max_seq_len",
    "train_parameters.precision",
    "train_parameters.lora_peft_config",
    "train_parameters.optimizer.name",
)
_STEERING = (
    "train_parameters.optimizer",
    "train_parameters.lr_scheduler",
    "train_parameters.epochs",
)


def _changes(config: Config, data: Dataset, state: dict[str, Any]) -> list[str]:
    """Say what steers the run and changed; refuse what makes it another run."""
    old, new = _flat(state["config"]), _flat(config_to_dict(config))
    old["train_parameters.precision"] = state["precision"]
    new["train_parameters.precision"] = config.train_parameters.effective_precision
    changed = {
        key: f"{key} (was {old.get(key)}, is {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    fixed = [text for key, text in changed.items() if key.startswith(_FIXED)]
    if state["data"] != data.fingerprint:
        fixed.append("the training data")
    train = config.train_parameters
    if fixed and not train.resume_despite_changes:
        raise CheckpointError(
            f"{train.output_dir}: its checkpoints were made with other settings; changed: "
            f"{', '.join(fixed)}. What follows would not be the run that was begun. Put them back, "
            "use another output_dir, or set train_parameters.resume_despite_changes: true"
        )
    steering = [text for key, text in changed.items() if key.startswith(_STEERING)]
    return [f"changed since the checkpoint: {text}" for text in dict.fromkeys(fixed + steering)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is not a mapping as JSON reads it."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def _global_batch(config: Config, dataset: DatasetConfig, state: dict[str, Any], asked: int) -> int:
    """The checkpoint's, unless the file asks for another one: rows a rank learns in a step."""
    train = config.train_parameters
    a_rank = dataset.train_bs * train.gradient_accumulation_steps
    if asked == state["global_batch"] or a_rank == state["rank_batch"]:
        return int(state["global_batch"])
    if train.resume_despite_changes:
        return asked
    raise CheckpointError(
        f"{train.output_dir}: its checkpoint was made with {state['global_batch']} rows a step "
        f"({state['rank_batch']} on each of {state['world']} ranks), train_bs x "
        f"gradient_accumulation_steps x ranks is {asked} now. Put dataset.train_bs and "
        "train_parameters.gradient_accumulation_steps back (the batch then stays what it was on "
        "any number of ranks), or set train_parameters.resume_despite_changes: true"
    )
