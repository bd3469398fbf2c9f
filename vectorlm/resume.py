"""Where a run begins: at the beginning, or at its newest sound checkpoint. Floor 3, used by
`assemble`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vectorlm.checkpoint import Checkpoints, read_state
from vectorlm.config.continuity import FIXED, STEERING, among, changes
from vectorlm.config.schema import Config, DatasetConfig
from vectorlm.dataset import Dataset
from vectorlm.distributed import Ranks
from vectorlm.errors import CheckpointError
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


def _changes(config: Config, data: Dataset, state: dict[str, Any]) -> list[str]:
    """Say what steers the run and changed; refuse what makes it another run."""
    changed = changes(config, state)
    fixed = among(changed, FIXED)
    if state["data"] != data.fingerprint:
        fixed.append("the training data")
    train = config.train_parameters
    if fixed and not train.resume_despite_changes:
        raise CheckpointError(
            f"{train.output_dir}: its checkpoints were made with other settings; changed: "
            f"{', '.join(fixed)}. What follows would not be the run that was begun. Put them back, "
            "use another output_dir, or set train_parameters.resume_despite_changes: true"
        )
    steering = among(changed, STEERING)
    return [f"changed since the checkpoint: {text}" for text in dict.fromkeys(fixed + steering)]


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
