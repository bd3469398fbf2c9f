"""What a look before the queue finds, and what it looks at. Floor 1; every file of this room yields
Findings of one Surroundings.

error: the job will certainly fail. warning: it probably will, or will do what is not wanted. note:
a fact to know.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from vectorlm.check.model_files import ModelFiles
from vectorlm.config.schema import Config
from vectorlm.errors import ModelError
from vectorlm.hub_cache import find_model_folder
from vectorlm.plan.outlook import Outlook, make_outlook
from vectorlm.plan.shapes import ModelShape, read_shape

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """`where` is a key of the YAML file or a path; `cure` says what to do."""

    severity: Severity
    where: str
    text: str
    cure: str


def error(where: str, text: str, cure: str) -> Finding:
    return Finding("error", where, text, cure)


def warning(where: str, text: str, cure: str) -> Finding:
    return Finding("warning", where, text, cure)


def note(where: str, text: str, cure: str) -> Finding:
    return Finding("note", where, text, cure)


@dataclass(frozen=True)
class Surroundings:
    """One run: what its configuration says, and the machine it is checked on."""

    config: Config
    config_path: str
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    prepares: bool = False  # whether a job prepares the data first
    overrides: Sequence[str] = ()

    @cached_property
    def model_folder(self) -> Path | None:
        """The folder the run would read the model from; None where there is none here."""
        return find_model_folder(self.config.model, self.environ)

    @cached_property
    def model(self) -> ModelFiles | None:
        return ModelFiles(self.model_folder) if self.model_folder else None

    def command(self, verb: str) -> str:
        """To be copied into a shell."""
        words = ["vectorlm", verb, "--config", self.config_path]
        return shlex.join(words + [word for one in self.overrides for word in ("--set", one)])

    @property
    def planned(self) -> Config:
        """The configuration with the model's folder, for those who read the folder again."""
        return self.config.model_copy(update={"model": str(self.model_folder)})

    @cached_property
    def shape(self) -> ModelShape | None:
        if self.model is None or self.model.model_type is None:
            return None
        try:
            return read_shape(str(self.model_folder))
        except ModelError:
            return None

    @cached_property
    def outlook(self) -> Outlook | None:
        """None where the model is not there, or its config is wrong: that is said elsewhere."""
        return make_outlook(self.planned, shape=self.shape) if self.shape else None

    @property
    def ranks(self) -> int | None:
        """None: not said by the file, `vectorlm train` takes what GPUs there are."""
        slurm = self.config.slurm
        return slurm.nodes * slurm.ranks_per_node if slurm else None

    @property
    def uses_gpus(self) -> bool:
        return self.config.slurm is not None and self.config.slurm.gpus_per_node > 0

    @property
    def output_dir(self) -> Path:
        return Path(os.path.expanduser(self.config.train_parameters.output_dir))

    @property
    def other_environment(self) -> str | None:
        """Why the job's Python may be another one than this, or None."""
        slurm = self.config.slurm
        if slurm is None:
            return None
        if slurm.container_image:
            return "slurm.container_image"
        switches = ("activate", "conda", "mamba", "module ", "PATH=", "ml ", "spack")
        if any(word in line for line in slurm.setup for word in switches):
            return "slurm.setup"
        return None
