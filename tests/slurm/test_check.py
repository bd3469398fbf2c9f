"""What `check` finds a real Slurm not to have: two nodes of 8 CPUs, 8000 MB and four a100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project, says
from tests.slurm.lab import Lab
from vectorlm.check.cluster_limits import look
from vectorlm.check.output_folder import look as look_at_output
from vectorlm.cluster.claim import OWNER


@pytest.fixture
def project(slurm: Lab, tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.environ = dict(slurm.env)
    made.slurm(partition="a100", mem="2G", cpus_per_gpu=1)
    return made


SOUND: list[dict[str, Any]] = [
    {},
    {"nodes": 2, "gpus_per_node": 4, "gpu_type": "a100", "cpus_per_gpu": 2, "mem": "8000M"},
    {"partition": "a100,grace", "gpus_per_node": 1},
    {"partition": None, "time": "7-00:00:00"},
    {"exclude": "n[1-1]", "mem": "0"},
]


@pytest.mark.parametrize("keys", SOUND, ids=str)
def test_what_it_has(keys: dict[str, Any], project: Project) -> None:
    project.slurm(**keys)
    assert project.find(look) == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"partition": "a10"}, "slurm.partition: .* no partition a10", "did you mean a100\\?"),
    ({"nodes": 3}, "slurm.nodes: in partition a100 2 of 2 nodes .* needs 3", "at most 2"),
    ({"gpus_per_node": 5}, "gpus_per_node: .* no node has 5 GPUs", "at most 4"),
    ({"gpus_per_node": 1, "gpu_type": "h100"}, "gpu_type: .* type h100", "there is: a100"),
    ({"cpus_per_gpu": 9}, "cpus_per_gpu: .* 9 CPU cores", "at most 8"),
    ({"mem": "9000M"}, "slurm.mem: .* 9000M of memory", "at most 8000M"),
    ({"constraint": "nvlink"}, "constraint: .* features nvlink", "remove slurm.constraint"),
    ({"nodes": 2, "exclude": "n1"}, "slurm.exclude: .* needs 2", "exclude fewer"),
    ({"exclude": "n9"}, "slurm.exclude: .* no node n9", "n1, n2"),
    ({"reservation": "night"}, "no reservation night", "remove slurm.reservation"),
    ({"extra_flags": ["--fly"]}, "unrecognized option '--fly'", "extra_flags"),
    ({"preprocess": {"partition": "cpus"}}, "preprocess.partition: .* cpus", "mean cpu\\?"),
]


@pytest.mark.parametrize(("keys", "text", "cure"), WRONG, ids=[text for _, text, _ in WRONG])
def test_what_it_has_not(keys: dict[str, Any], text: str, cure: str, project: Project) -> None:
    project.slurm(**keys)
    assert says(project.one(look), text, cure)


def test_one_of_several_partitions_is_enough(project: Project) -> None:
    project.slurm(partition="nowhere,a100")
    assert says(project.one(look), "no partition nowhere", "there is: a100")


def test_limits_of_a_partition(slurm: Lab, project: Project) -> None:
    name = ["PartitionName=brief"]
    slurm.run("scontrol", "create", *name, "Nodes=n[1-2]", "MaxTime=30", "MaxNodes=1")
    try:
        project.slurm(partition="brief", time="08:00:00")
        assert says(project.one(look), "slurm.time: 08:00:00 is more .*brief", "at most 00:30:00")
        project.slurm(time="00:20:00", nodes=2)
        assert says(project.one(look), "slurm.nodes: 2 nodes are more", "at most 1")
        project.slurm(nodes=1)
        assert project.find(look) == []
        slurm.run("scontrol", "update", *name, "State=DOWN")
        assert says(project.one(look, "warning"), "partition brief is DOWN", "another partition")
    finally:
        slurm.run("scontrol", "delete", *name)


def test_nodes_that_are_away_are_a_warning(slurm: Lab, project: Project) -> None:
    project.slurm(nodes=2)
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        assert says(project.one(look, "warning"), "of 2 nodes that fit .*, 1 are up", "sinfo -R")
    finally:
        slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_a_folder_that_a_job_works_in(
    slurm: Lab, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    job = slurm.sbatch("--wrap", "sleep 60")
    slurm.wait(job, "RUNNING")
    project.output.mkdir()
    (project.output / OWNER).write_text(f'{{"id": "x", "job": "{job}", "job_id": "{job}"}}')
    assert says(project.one(look_at_output), f"in use by job {job}", "wait for it")
    slurm.cancel(job)
    slurm.wait(job)
    assert project.find(look_at_output) == []


def test_a_slurm_that_does_not_answer_is_a_note(project: Project) -> None:
    project.environ["SLURM_CONF"] = "/nowhere/slurm.conf"
    assert says(project.one(look, "note"), "Slurm cannot be asked", "login node")
