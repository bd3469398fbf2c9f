"""Many jobs that start on one node at once do not get in each other's way."""

from __future__ import annotations

import sys

from tests.slurm.conftest import LabMaker

JOBS = 50
RANK = """
import os, socket, sys, time
from pathlib import Path
from vectorlm.cluster import env, meeting

assert env.adopt()
folder, jobs = Path(sys.argv[1]), int(sys.argv[2])
job, rank, name = os.environ["SLURM_JOB_ID"], os.environ["RANK"], meeting.meeting_name()
(folder / f"ready-{job}-{rank}").touch()
deadline = time.monotonic() + 60
while len(list(folder.glob("ready-*"))) < 2 * jobs:  # all at the same moment
    assert time.monotonic() < deadline, "the other jobs are not there"
    time.sleep(0.05)
if rank == "0":
    with socket.create_server(("", 0)) as store:
        thread = meeting.announce(name, store.getsockname()[1], guests=1)
        store.settimeout(60)
        guest, _ = store.accept()
        guest.sendall(job.encode())
        guest.close()
    thread.join(60)
else:
    port = meeting.ask(os.environ["MASTER_ADDR"], name, 60)
    with socket.create_connection((os.environ["MASTER_ADDR"], port)) as host:
        met = host.recv(100).decode()
    (folder / f"met-{job}").write_text(met)
"""


def test_fifty_jobs_on_one_node(slurm_lab: LabMaker) -> None:
    lab = slurm_lab(nodes=1, cpus=2 * JOBS)
    program = lab.jobs / "rank.py"
    program.write_text(RANK)
    script = lab.script(
        f"srun --kill-on-bad-exit=1 -n2 {sys.executable} {program} {lab.jobs} {JOBS}"
    )
    jobs = [lab.sbatch("-n2", "--mem-per-cpu=10", script) for _ in range(JOBS)]
    states = {job: lab.wait(job, limit_s=90) for job in jobs}
    assert set(states.values()) == {"COMPLETED"}, [
        lab.log(job) for job, state in states.items() if state != "COMPLETED"
    ][:3]
    assert {job: (lab.jobs / f"met-{job}").read_text() for job in jobs} == {
        job: job for job in jobs
    }
