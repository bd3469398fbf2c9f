"""Every error a user can cause or cure, on floor 0; raised anywhere, printed by the doors.

    VectorLMError              exit 2, no traceback
    |- ConfigError             the YAML file, --set, or keys that contradict each other
    |- DataError               source rows, a prepared folder, a manifest that does not fit
    |- ModelError              the model folder, its tokenizer, a part this model cannot have
    |- CheckpointError         a checkpoint that cannot be written, trusted or resumed from
    |- ExportError             a model that cannot be written or does not reload as it was
    |- ClusterError            ranks, network, launcher
    |  `- RankLostError        another rank has left; exit 1, for it is not the user's mistake
    `- TrainingError           the run itself: a loss that is no number

A message says where, what was given, what is allowed, and what to do.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 75
EXIT_STOPPED_UNSAVED = 3


class VectorLMError(Exception):
    """A mistake or a condition that the user can cure; the message is all that is printed."""

    exit_code = EXIT_USER
    said = False  # another rank has printed the same


class ConfigError(VectorLMError):
    """The configuration is wrong; the message lists every problem, one a line."""


class DataError(VectorLMError):
    """The data cannot be prepared, or was prepared for something else."""


class ModelError(VectorLMError):
    """The model folder or a part asked for it is wrong."""


class CheckpointError(VectorLMError):
    """A checkpoint cannot be written, trusted or resumed from."""


class ExportError(VectorLMError):
    """A model cannot be exported, or does not come back as it was."""


class ClusterError(VectorLMError):
    """Ranks cannot be started or cannot reach each other."""


class RankLostError(ClusterError):
    """Another rank has left; why, the one that left first says."""

    exit_code = EXIT_FAULT


class TrainingError(VectorLMError):
    """Training cannot go on: a non-finite loss, an impossible step."""
