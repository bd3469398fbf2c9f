"""The runs of a sweep, as changes to the one configuration they come from. Floor 0.

Whoever starts the runs gives `overrides_of` of one point to `load_config`, beside the file; `load`
itself looks at every point, so that a run of the array cannot fail for a mistake in the file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from vectorlm.config.schema import Config, Sweep

Point = dict[str, Any]
MOST_RUNS = 1000


def sweep_points(config: Config) -> list[Point]:
    """The keys and values of each run; the last key of the grid changes fastest, and all of the
    grid is done for one of `runs` before the next."""
    sweep = config.sweep
    if sweep is None:
        return []
    axes = [[(name, value) for value in values] for name, values in sweep.grid.items()]
    grid = [dict(choice) for choice in itertools.product(*axes)]
    return [run | point for run in sweep.runs or [{}] for point in grid]


def total_runs(sweep: Sweep) -> int:
    return math.prod(map(len, sweep.grid.values())) * max(len(sweep.runs), 1)


def overrides_of(point: Point) -> list[str]:
    """The point as `--set` takes it: `load_config(path, overrides_of(point))` is that run, which is
    no sweep itself."""
    return [*(f"{name}={_yaml(value)}" for name, value in point.items()), "sweep=null"]


def _yaml(value: Any) -> str:
    """JSON, which YAML reads alike but for characters it does not take or writes in another way."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda found: rf"\U{ord(found[0]):08x}", text)
