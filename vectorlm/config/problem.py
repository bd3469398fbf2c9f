"""What a rule says of a configuration. Floor 0; made by `checks`, told by `load`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """The message stands behind the first of `keys` that was given."""

    keys: tuple[str, ...]
    message: str
