"""Which values an argument of an optimizer can take, told by its default. Floor 0; `optim` refuses
by it, and `check` before the queue.

torch looks at few of them: of `amsgrad: "no"` it makes true, and a momentum that is no number ends
a run at its first step.
"""

from __future__ import annotations

from typing import Any

SWITCHES = ("foreach", "fused")  # their default is None: torch decides
ROUNDS = ("ns_steps",)


def allowed_instead(name: str, value: Any, default: Any) -> str | None:
    """What must be given in place of that value; None where the value will do."""
    if name in SWITCHES or isinstance(default, bool):
        is_sound = isinstance(value, bool) or (value is None and name in SWITCHES)
        return None if is_sound else "true or false, without quotes"
    if name in ROUNDS:
        is_sound = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if is_sound else "a whole number, at least 1"
    if isinstance(default, int | float):
        return None if _is_number(value) and value >= 0 else "a number, at least 0"
    if isinstance(default, tuple):
        is_sound = isinstance(value, list | tuple) and len(value) == len(default)
        is_sound = is_sound and all(map(_is_number, value))
        return None if is_sound else f"a list of {len(default)} numbers"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
