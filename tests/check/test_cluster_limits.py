"""The texts of Slurm as they are read; a real one is asked in tests/slurm/test_check.py."""

from __future__ import annotations

import pytest

from tests.check.project import Project, program, says
from vectorlm.check.cluster_limits import Node, _expanded, look
from vectorlm.cluster.slurm import fields
from vectorlm.config.job_text import megabytes

# As `scontrol -o show` prints them, shortened.
PARTITION = (
    "PartitionName=gpu AllowGroups=ALL AllowAccounts=physics,biology AllowQos=ALL Default=NO "
    "MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 State=UP MaxMemPerNode=UNLIMITED"
)
NODE = (
    "NodeName={name} CPUTot=64 AvailableFeatures=a100,ib Gres={gres} NodeAddr=x "
    "RealMemory=512000 State={state} Partitions=gpu,long "
)


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:2,gpu:v100:2,nvme:1", {"a100": 2, "v100": 2}),
        ("(null)", {}),
    ],
)
def test_gpus_of_a_node(gres: str, found: dict[str, int]) -> None:
    assert Node("n", fields(NODE.format(name="n", gres=gres, state="IDLE"))).gpus == found


@pytest.mark.parametrize(
    ("state", "away"),
    [("IDLE", False), ("IDLE+CLOUD+POWERED_DOWN", False), ("IDLE+DRAIN", True), ("DOWN*", True)],
)
def test_states_of_a_node(state: str, away: bool) -> None:
    assert Node("n", {"State": state}).away is away


def test_lists_of_nodes() -> None:
    assert _expanded("gpu[08-10,12],x1") == {"gpu08", "gpu09", "gpu10", "gpu12", "x1"}
    assert _expanded("") == set()


def test_sizes() -> None:
    texts = ("0", "900", "2048K", "32G", "1t")
    assert [megabytes(text) for text in texts] == [0, 900, 2, 32768, 1048576]


@pytest.fixture
def site(project: Project) -> Project:
    """A site that answers as recorded: accounts and their limits, which small labs do not have."""
    folder = project.folder / "bin"
    nodes = [NODE.format(name=f"g{i}", gres="gpu:a100:4", state="IDLE") for i in (1, 2)]
    answers = {"partition": PARTITION, "node": "\n".join(nodes), "reservation": "No reservations"}
    program(folder, "scontrol", "")
    cases = "\n".join(f"{name}) cat <<'END'\n{said}\nEND\n;;" for name, said in answers.items())
    (folder / "scontrol").write_text(f'#!/bin/sh\ncase "$3" in\n{cases}\nesac\n')
    program(folder, "sbatch", "")
    assoc = "physics|normal,quick"
    qos = "normal|||\nquick|01:00:00||gres/gpu=2"
    said = f'case "$*" in\n*assoc*) echo "{assoc}";;\n*) echo "{qos}";;\nesac'
    (folder / "sacctmgr").write_text(f"#!/bin/sh\n{said}\n")
    (folder / "sacctmgr").chmod(0o755)
    project.environ["PATH"] = f"{folder}:/usr/bin:/bin"
    project.slurm(partition="gpu", account="physics", gpus_per_node=4, gpu_type="a100")
    return project


def test_what_the_site_allows(site: Project) -> None:
    assert site.find(look) == []


WRONG: list[tuple[dict[str, object], str, str]] = [
    ({"account": "chemistry"}, "slurm.account: partition gpu does not take", "physics,biology"),
    ({"account": "biology"}, "slurm.account: you are not in account biology", "physics"),
    ({"qos": "gold"}, "slurm.qos: you may not use gold", "normal, quick"),
    ({"qos": "quick", "gpus_per_node": 2}, "slurm.time: 08:00:00 .* qos quick", "01:00:00"),
    ({"qos": "quick", "time": "1:0:0"}, "gpus_per_node: 4 GPUs .* qos quick", "at most 2"),
    ({"time": "3-0"}, "slurm.time: 3-0 .* partition gpu", "at most 2-00:00:00"),
    ({"partition": None}, "slurm.partition: is not given", "give one of: gpu"),
]


@pytest.mark.parametrize(("keys", "text", "cure"), WRONG, ids=[text for _, text, _ in WRONG])
def test_what_it_does_not(keys: dict[str, object], text: str, cure: str, site: Project) -> None:
    site.slurm(**keys)
    found = site.find(look)
    assert {finding.severity for finding in found} == {"error"}
    assert says(found[0], text, cure)


def test_without_slurm_nothing_is_said(site: Project) -> None:
    site.environ["PATH"] = "/nowhere"
    site.slurm(partition="away")
    assert site.find(look) == []
