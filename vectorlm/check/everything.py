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
    ranks,
    secrets,
)
from vectorlm.check.finding import Finding, Surroundings, note, warning
from vectorlm.cluster.script import POINT_NAME
from vectorlm.config.keys import KeyPath
from vectorlm.config.load import load_config, load_sound_part
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
    "ranks": ranks.look,
    "script": job_script.look,
    "slurm": cluster_limits.look,
    "fitting": fitting.look,
    "packages": packages.look,
    "downloads": downloads.look,
    "secrets": secrets.look,
}
# The keys that each depends on: of what is in doubt nothing can be told.
NEEDS = {
    "model": "model train_parameters.max_seq_len dataset_preprocess.add_bos_eos_tokens",
    "arguments": "train_parameters.optimizer train_parameters.lr_scheduler_type "
    "train_parameters.lr_scheduler_kwargs train_parameters.lora_peft_config",
    "adapters": "model train_parameters.lora_peft_config",
    "data": "model dataset dataset_preprocess train_parameters.max_seq_len "
    "train_parameters.gradient_accumulation_steps",
    "output": "model train_parameters dataset slurm sweep",
    "ranks": "train_parameters.sharding_strategy train_parameters.shard_group_size slurm",
    "script": "slurm train_parameters.output_dir",
    "slurm": "slurm train_parameters.output_dir",
    "fitting": "model train_parameters dataset slurm",
    "packages": "enable_wandb_logging enable_tensorboard_logging train_parameters.precision "
    "train_parameters.use_mp train_parameters.reduce_dtype train_parameters.use_liger_kernel "
    "train_parameters.lora_peft_config slurm",
    "downloads": "model enable_wandb_logging wandb_config",
    "secrets": "",
}
# The topics in the words of docs/check.md.
NAMES = {
    "model": "the model",
    "arguments": "the optimizer and the schedule",
    "adapters": "LoRA",
    "data": "the data",
    "output": "the output folder",
    "ranks": "groups of ranks",
    "script": "the job's script",
    "fitting": "the fit",
    "slurm": "Slurm",
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
        Surroundings(run, config_path, environ, prepares, overrides)
        for run in _runs(config, config_path, overrides)
    ]
    return _looked(runs, TOPICS)


def findings_beside(
    config_path: str, environ: Mapping[str, str] = os.environ, overrides: Sequence[str] = ()
) -> list[Finding]:
    """What else there is to say of a file with mistakes: of all that does not depend on them."""
    sound = load_sound_part(config_path, overrides)
    if sound is None:
        return []
    config, doubtful = sound
    if _overlaps("slurm", doubtful):
        config = config.model_copy(update={"slurm": None})
    apart = {name for name in TOPICS if any(_overlaps(k, doubtful) for k in NEEDS[name].split())}
    looks = {name: look for name, look in TOPICS.items() if name not in apart}
    found = _looked([Surroundings(config, config_path, environ, overrides=overrides)], looks)
    if apart:
        names = ", ".join(NAMES.get(name, name) for name in TOPICS if name in apart)
        text = f"not looked at, for they depend on keys that are wrong: {names}"
        found.append(note(config_path, text, "mend the file, and check it again"))
    return found


def _overlaps(name: str, doubtful: frozenset[KeyPath]) -> bool:
    """Whether the key, a section around it or something inside it is among those in doubt."""
    key = tuple(name.split("."))
    return any(key[: len(path)] == path or path[: len(key)] == key for path in doubtful)


def _looked(runs: Sequence[Surroundings], looks: Mapping[str, Look]) -> list[Finding]:
    watched = [_Watch(name, look, runs) for name, look in looks.items()]
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
