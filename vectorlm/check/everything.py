"""Every look before the queue, at the same time and within a limit. Floor 1, called by the doors
`check` and `submit`.

A file system or a controller that does not answer makes a finding, not a hang.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from vectorlm.check import (
    adapters,
    arguments,
    cluster_limits,
    data_folder,
    downloads,
    fitting,
    job_script,
    model_folder,
    output_folder,
    packages,
    secrets,
)
from vectorlm.check.finding import Finding, Surroundings, warning
from vectorlm.cluster.script import POINT_NAME
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.config.sweep import overrides_of, sweep_points

LIMIT_S = 8.0
Look = Callable[[Surroundings], Iterator[Finding]]
TOPICS: dict[str, Look] = {
    "model": model_folder.look,
    "arguments": arguments.look,
    "adapters": adapters.look,
    "data": data_folder.look,
    "output": output_folder.look,
    "script": job_script.look,
    "slurm": cluster_limits.look,
    "fitting": fitting.look,
    "packages": packages.look,
    "downloads": downloads.look,
    "secrets": secrets.look,
}
# What does not answer in time, in the words of the file.
PLACES = {
    "model": "the folder of the model",
    "data": "a folder of the data",
    "output": "the file system of output_dir",
    "slurm": "Slurm",
    "downloads": "the cache of downloads",
}


def findings(
    config: Config,
    config_path: str,
    environ: Mapping[str, str] = os.environ,
    overrides: Sequence[str] = (),
    prepares: bool = False,
) -> list[Finding]:
    """All there is to say, the worst first; of a sweep for all its runs, each thing once."""
    runs = [
        Surroundings(run, config_path, environ, prepares)
        for run in _runs(config, config_path, overrides)
    ]
    watched = [_Watch(name, look, runs) for name, look in TOPICS.items()]
    deadline = time.monotonic() + LIMIT_S
    for watch in watched:
        watch.wait(deadline - time.monotonic())
    order = ("error", "warning", "note")
    told = dict.fromkeys(chain.from_iterable(list(watch.found) for watch in watched))
    return sorted(told, key=lambda finding: order.index(finding.severity))


class _Watch:
    """One topic in a thread of its own; what it has found counts even if it never ends."""

    def __init__(self, name: str, look: Look, runs: Sequence[Surroundings]) -> None:
        self._name, self._look, self._runs = name, look, runs
        self.found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for run in self._runs:
                for finding in self._look(run):
                    self.found.append(finding)
        # A fault of ours must not keep what the others have found from the user.
        except Exception as fault:
            text = f"could not be looked at to the end ({type(fault).__name__}: {fault})"
            self.found.append(warning(self._name, text, "please report it"))

    def wait(self, limit_s: float) -> None:
        self._thread.join(max(limit_s, 0))
        if self._thread.is_alive():
            place = PLACES.get(self._name, self._name)
            text = f"{place} did not answer within {LIMIT_S:.0f} s, so not everything was looked at"
            self.found.append(
                warning(self._name, text, "try again; if it stays so, a job would hang")
            )


# --- the runs of a sweep --------------------------------------------------------------------------


def _runs(config: Config, config_path: str, overrides: Sequence[str]) -> Iterator[Config]:
    """The run; of a sweep one for each value of each key, which is where runs differ."""
    if config.sweep is None:
        yield config
        return
    seen: set[str] = set()
    for number, changes in enumerate(sweep_points(config)):
        new = {f"{key}={value!r}" for key, value in changes.items()} - seen
        if new or not number:
            seen |= new
            run = load_config(config_path, [*overrides, *overrides_of(changes)])
            folder = os.path.join(config.train_parameters.output_dir, POINT_NAME % number)
            train = run.train_parameters.model_copy(update={"output_dir": folder})
            yield run.model_copy(update={"train_parameters": train})
