"""The lab itself: what the other Slurm tests take for granted."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import LabMaker, demand
from tests.slurm.lab import CLUSTER, Lab

# Says which start of the job this is, and runs on in the first.
SLEEPER = 'echo "start ${SLURM_RESTART_COUNT:-0}"; [ "$SLURM_RESTART_COUNT" ] || srun sleep 60'


def resume(slurm: Lab, job: str, limit_s: float) -> None:
    """Wait until the job runs to its end in its second start, and only there."""
    assert slurm.wait(job, limit_s=limit_s) == "COMPLETED"
    starts = [line for line in slurm.log(job).splitlines() if line.startswith("start")]
    assert starts == ["start 0", "start 1"]
    assert slurm.fields(job)["Restarts"] == "1"


def submit_sleeper(slurm: Lab, *arguments: str) -> str:
    job = slurm.sbatch("--open-mode=append", *arguments, slurm.script(SLEEPER, "sleeper.sh"))
    slurm.wait_log(job, "start 0", limit_s=10)
    return job


def test_nodes_have_names_gpus_and_this_python(slurm: Lab) -> None:
    code = "import os, socket, pytest; print(socket.gethostname(), os.environ['SLURM_PROCID'])"
    done = slurm.run("srun", "-N2", "--gres=gpu:a100:4", sys.executable, "-c", code)
    assert sorted(done.stdout.splitlines()) == ["n1 0", "n2 1"]
    devices = slurm.run("srun", "-N1", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert devices.stdout.strip() == "0,1"


def test_signal_reaches_the_steps(slurm: Lab) -> None:
    step = slurm.script("trap 'echo got it; exit' USR1; echo up; sleep 30 & wait", "step.sh")
    step.chmod(0o755)
    job = slurm.sbatch("-N2", "--wrap", f"srun {step}")
    slurm.until(lambda: slurm.log(job).count("up") == 2, "two tasks", 10, job)
    slurm.signal(job, "USR1")
    assert slurm.wait(job, limit_s=10) == "COMPLETED"
    assert slurm.log(job).count("got it") == 2


def test_preempted_job_starts_again(slurm: Lab) -> None:
    job = submit_sleeper(slurm, "-N2", "--exclusive")
    slurm.sbatch("-N2", "--exclusive", "-p", "urgent", "--wrap", "true")
    resume(slurm, job, limit_s=25)


def test_jobs_start_again_after_a_requeue_and_after_a_crash(slurm: Lab) -> None:
    here, there = submit_sleeper(slurm, "-w", "n1"), submit_sleeper(slurm, "-w", "n2")
    slurm.requeue(here)
    slurm.crash("n2")
    resume(slurm, here, limit_s=15)
    slurm.until(lambda: slurm.node_state("n2").startswith("down"), "n2 down", 30, there)
    slurm.start("n2")
    resume(slurm, there, limit_s=25)


def test_nodes_with_networks_can_be_slowed_and_unplugged(slurm_lab: LabMaker) -> None:
    lab = slurm_lab(networks=True)
    name = lab.run("srun", "-N1", "-w", "n2", "cat", "/proc/self/net/dev").stdout
    assert "eth0" in name
    assert reaches(lab, "n2")
    lab.limit("200mbit")
    lab.unplug("n2")
    assert not reaches(lab, "n2")
    lab.plug("n2")
    lab.until(lambda: reaches(lab, "n2"), "n2 on the network", 10)


def reaches(lab: Lab, node: str) -> bool:
    """Whether this machine reaches the node's slurmd."""
    text = lab.run("scontrol", "-o", "show", "node", node).stdout
    fields = dict(part.split("=", 1) for part in text.split() if "=" in part)
    try:
        socket.create_connection((fields["NodeAddr"], int(fields["Port"])), timeout=1).close()
    except OSError:
        return False
    return True


def test_accounting_answers(slurm_lab: LabMaker) -> None:
    lab = slurm_lab(accounting=True)
    job = lab.sbatch("--wrap", "exit 3")
    assert lab.wait(job, limit_s=10) == "FAILED"
    ask = ("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,ExitCode")
    lab.until(lambda: lab.run(*ask).stdout.strip() == "FAILED|3:0", "row in sacct", 15, job)


def test_lab_ends_with_its_owner(slurm: Lab, tmp_path: Path) -> None:
    code = (
        "from tests.slurm.lab import Lab; lab = Lab(nodes=1); lab.sbatch('--wrap', 'sleep 100');"
        "print(lab.folder, flush=True); input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=CLUSTER.parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout
    assert owner.stdin
    folder = owner.stdout.readline().strip()
    assert processes_of(folder) >= 5
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=5)
    owner.stdin.close()
    owner.stdout.close()
    end = time.monotonic() + 15
    while Path(folder).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(folder).exists()
    assert processes_of(folder) == 0


def processes_of(folder: str) -> int:
    """How many living processes belong to a lab, as their environment or command line has it."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            count += folder in process.joinpath("cmdline").read_text(errors="replace") or (
                folder in process.joinpath("environ").read_text(errors="replace")
            )
        except OSError:  # it ended, or is a thread of the kernel
            continue
    return count


def test_missing_slurm_skips_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VECTORLM_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no slurmctld.*apt-get install"):
        demand(accounting=False)
    monkeypatch.setenv("VECTORLM_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no slurmctld.*apt-get install"):
        demand(accounting=False)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: apt-get install it")
def test_scripts_are_clean() -> None:
    scripts = sorted(CLUSTER.glob("*.sh"))
    assert scripts
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=CLUSTER, check=False
    )
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)
