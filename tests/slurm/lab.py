"""A real Slurm for tests: two or more "nodes" on this machine, started by cluster/up.sh.

Nodes have their own host names and process ids and share the files: a job runs the same Python as
the test. A lab ends with the process that made it, however that ends: see cluster/hold.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

CLUSTER = Path(__file__).parent / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip", "tc")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb")
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
)


def missing(accounting: bool = False) -> str | None:
    """Why there can be no lab on this machine; None when there can."""
    if os.geteuid() != 0:
        return "the Slurm tests start nodes of their own, which only root may"
    programs = PROGRAMS + (ACCOUNTING if accounting else ())
    absent = [name for name in programs if not shutil.which(name)]
    if absent:
        more = " slurmdbd slurm-wlm-mysql-plugin mariadb-server" if accounting else ""
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2{more}"
    namespaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True, timeout=10, check=False).returncode:
        return "this root may not make namespaces (a container without CAP_SYS_ADMIN)"
    return None


class Lab:
    """A cluster, and Slurm's commands for it. Every call has a time limit."""

    def __init__(
        self, accounting: bool = False, networks: bool = False, nodes: int = 2, cpus: int = 8
    ) -> None:
        # Not pytest's folder: the path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="vectorlm-slurm-", dir="/tmp"))
        self.jobs = self.folder / "jobs"
        self.jobs.mkdir()
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.crashed: set[str] = set()
        self.env = self._environment()
        wanted = {"NODES": nodes, "CPUS": cpus, "NS": 1 + networks, "DBD": int(accounting)}
        self._holder = subprocess.Popen(
            [CLUSTER / "hold.sh", self.folder],
            env={**os.environ, **{name: str(value) for name, value in wanted.items()}},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout
        said = self._holder.stdout.readline()
        if said != "up\n":
            said += self._holder.stdout.read()
            self.close()
            raise RuntimeError(f"the cluster did not start: {said}")

    def _environment(self) -> dict[str, str]:
        kept = {name: v for name, v in os.environ.items() if not re.match("SLURM_|SBATCH_", name)}
        return {
            **kept,
            "SLURM_CONF": str(self.folder / "etc/slurm.conf"),
            "XDG_STATE_HOME": str(self.folder / "xdg"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def close(self) -> None:
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.close()
        self._holder.wait(timeout=60)
        self._holder.stdout.close()

    # ---- commands ----

    def run(
        self, *command: str | Path, limit_s: float = 30, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command as a user of the cluster runs it, by default in the folder `jobs`."""
        done = subprocess.run(
            command,
            env=self.env,
            cwd=cwd or self.jobs,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        said = f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, said
        return done

    def sbatch(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """The id of the job. The script is the last argument, or `--wrap COMMAND`."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip()

    def script(self, text: str, name: str = "job.sh") -> Path:
        """A bash script in the folder `jobs`."""
        path = self.jobs / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        return path

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def signal(self, job: str, name: str) -> None:
        """To the tasks of the job's steps, not to its script: what `--signal=USR1@60` does."""
        self.run("scancel", f"--signal={name}", job)

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    # ---- what there is to see ----

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; of an array, of its first line."""
        text = self.run("scontrol", "-o", "show", "job", job).stdout.splitlines()[0]
        return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", text))

    def state(self, job: str) -> str:
        return self.fields(job)["JobState"]

    def log(self, job: str) -> str:
        """What the job has written to standard output so far."""
        path = Path(self.fields(job)["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, job: str, states: Collection[str] = ENDED, limit_s: float = 60) -> str:
        """Until the job is in one of these states, which is returned."""
        wanted = {states} if isinstance(states, str) else set(states)
        self.until(lambda: self.state(job) in wanted, f"{sorted(wanted)}", limit_s, job)
        return self.state(job)

    def wait_log(self, job: str, text: str, limit_s: float = 60) -> None:
        """Until this text stands in the job's log."""
        self.until(lambda: text in self.log(job), f"{text!r} in the log", limit_s, job)

    def until(
        self, check: Callable[[], bool], what: str, limit_s: float, job: str | None = None
    ) -> None:
        end = time.monotonic() + limit_s
        while not check():
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {limit_s:.0f} s\n{self.account(job)}")
            time.sleep(0.1)

    def account(self, job: str | None) -> str:
        """All there is to know about a job, for the message of a test that failed."""
        controller = (self.folder / "log/slurmctld.log").read_text(encoding="utf-8")
        parts = {
            "sinfo": self.run("sinfo", "-N", "-l").stdout,
            "squeue": self.run("squeue").stdout,
            "slurmctld": "\n".join(controller.splitlines()[-30:]),
        }
        if job:
            parts["scontrol show job"] = self.run("scontrol", "show", "job", job).stdout
            parts["log"] = self.log(job)[-8000:]
        return "\n".join(f"---- {name}\n{text}" for name, text in parts.items())

    # ---- nodes ----

    def crash(self, node: str) -> None:
        """A power cut; Slurm notices it within about 12 s."""
        self.crashed.add(node)
        self._node("crash", node)

    def start(self, node: str) -> None:
        """Boot a crashed node, and wait until jobs can run on it."""
        self._node("start", node)
        self.crashed.discard(node)
        up = re.compile("idle|mixed|allocated|completing")
        self.until(lambda: bool(up.fullmatch(self.node_state(node))), f"{node} up", 20)

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-p", "a100", "-n", node, "-o", "%T").stdout.strip()

    def unplug(self, node: str) -> None:
        """Take a node's network away (labs with networks); its processes run on."""
        self._node("unplug", node)

    def plug(self, node: str) -> None:
        self._node("plug", node)

    def limit(self, rate: str) -> None:
        """Let every node receive only so much, as in 200mbit (labs with networks)."""
        for node in self.nodes:
            self._node("limit", node, rate)

    def _node(self, verb: str, *arguments: str) -> None:
        self.run(CLUSTER / "node.sh", self.folder, verb, *arguments)

    # ---- between tests ----

    def queue(self) -> set[str]:
        """The jobs that wait or run; of an array, its own number."""
        return set(self.run("squeue", "-h", "-o", "%F").stdout.split())

    def tidy(self, keep: set[str]) -> None:
        """Boot what crashed, and cancel all jobs but these."""
        for node in sorted(self.crashed):
            self.start(node)
        others = self.queue() - keep
        if others:
            self.run("scancel", *others)
        self.until(lambda: not self.queue() - keep, "end of the cancelled jobs", 30)
