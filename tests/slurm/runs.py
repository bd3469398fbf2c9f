"""Training jobs on the tests' Slurm: rendered, submitted, interrupted, and looked at."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.distributed.runs import Run
from tests.slurm.lab import Lab
from vectorlm import checkpoint
from vectorlm.cluster.journal import PastStart, past_starts
from vectorlm.cluster.script import render
from vectorlm.config.load import load_config

SMALL = {
    "gpus_per_node": 0,
    "processes_per_node": 2,
    "cpus_per_gpu": 1,
    "mem": "2G",
    "time": "00:30:00",
}


class JobRun(Run):
    """A run that Slurm starts, with the script that VectorLM renders."""

    def __init__(
        self, lab: Lab, folder: Path, shared: dict[str, Any], slurm: dict[str, Any], **train: Any
    ) -> None:
        super().__init__(folder, shared, **train)
        self.lab, self.job = lab, ""
        self.slurm = {**SMALL, **slurm}
        self.change(slurm=self.slurm)

    @classmethod
    def at(cls, lab: Lab, output: Path, job: str) -> JobRun:
        """A run that was submitted otherwise, such as a task of an array."""
        run = cls.__new__(cls)
        run.folder, run.output, run.lab, run.job = output.parent, output, lab, job
        return run

    def change(self, **sections: Any) -> None:
        content = yaml.safe_load(self.config.read_text())
        self.config.write_text(yaml.safe_dump({**content, **sections}))

    def submit(self, *flags: str, environ: dict[str, str] | None = None) -> str:
        script = self.folder / "job.sh"
        script.write_text(render(load_config(self.config), str(self.config)))
        command = ["sbatch", "--parsable", f"--output={self.folder}/log", *flags, str(script)]
        self.job = self.lab.run(*command, cwd=self.folder).stdout.strip()
        return self.job

    # ---- to see ----

    def starts(self) -> list[PastStart]:
        return past_starts(self.output)

    def restarts(self) -> int:
        return int(self.lab.fields(self.job)["Restarts"])

    def checkpoint_steps(self) -> list[int]:
        return [checkpoint.step_of(folder) for folder in checkpoint.step_folders(self.output)]

    def newest_tensors(self) -> dict[str, str]:
        """The hashes of the newest checkpoint's tensors: parameters, optimizer state, RNG."""
        newest = checkpoint.newest(self.output)
        assert newest is not None
        manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
        return {n: e["sha256"] for n, e in manifest["files"].items() if n.endswith(".distcp")}

    def newest_state(self) -> dict[str, Any]:
        newest = checkpoint.newest(self.output)
        assert newest is not None
        return checkpoint.read_state(newest)

    # ---- to wait for ----

    def until(self, check: Callable[[], bool], what: str, limit_s: float = 90) -> None:
        self.lab.until(check, what, limit_s, self.job)

    def until_begun(self, start: int = 1) -> None:
        """srun has just started the processes: Python is loading."""
        self.until(lambda: bool(list(self.pids())), f"processes of start {start}")

    def until_claimed(self, start: int = 1) -> None:
        """The folder is claimed, the model is being loaded."""
        self.until(lambda: self._last_restart() >= start - 1, f"start {start}")

    def until_saved(self, start: int = 1) -> None:
        """This start has trained, and saved its second checkpoint."""
        self.until_claimed(start)
        begun = max([*self.checkpoint_steps(), 0])
        self.until(lambda: max([*self.checkpoint_steps(), 0]) >= begun + 20, "two checkpoints")

    def _last_restart(self) -> int:
        return max([past.start.restart for past in self.starts()], default=-1)

    def until_restarted(self, times: int) -> None:
        self.until(lambda: self.restarts() >= times, f"restart {times}")

    # ---- processes ----

    def pids(self, rank: int | None = None) -> Iterator[int]:
        """The training processes of the job, as this machine numbers them."""
        wanted = {
            f"SLURM_CONF={self.lab.env['SLURM_CONF']}".encode(),
            f"SLURM_JOB_ID={self.lab.fields(self.job)['JobId']}".encode(),
        }
        if rank is not None:
            wanted.add(f"SLURM_PROCID={rank}".encode())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                environ = set((folder / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            if b"vectorlm.train" in command and command[0].endswith(b"python"):
                if wanted <= environ and b"SLURM_STEP_ID=0" in environ:
                    yield int(folder.name)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        for pid in self.pids(rank):
            os.kill(pid, number)


def assert_same(run: JobRun, expected: Run, steps: int) -> None:
    """After so many steps, to the bit."""
    assert run.facts() == expected.facts()
    model, wanted = run.model(), expected.model()
    assert model.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(model[name], tensor), name
    assert run.newest_state()["step"] == steps
    other = JobRun.newest_tensors(expected)  # type: ignore[arg-type]
    assert run.newest_tensors() == other


@contextmanager
def held(pids: Collection[int]) -> Iterator[None]:
    """Time passes meanwhile, and no step does; Slurm wakes whom it signals."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def preempt(run: JobRun) -> None:
    """By a short job that is more urgent and takes both nodes."""
    with held(list(run.pids())):
        urgent = run.lab.sbatch("-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 2")
        run.lab.wait(urgent)
