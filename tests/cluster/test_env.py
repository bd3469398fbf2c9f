"""Slurm's variables make a rank of a process, and its files are its own."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from vectorlm.cluster import env
from vectorlm.errors import ClusterError


def step(**changed: str) -> dict[str, str]:
    """What srun gives the fourth of five processes on three nodes."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "MASTER_ADDR": "127.0.0.1",
        **changed,
    }


def test_a_process_of_srun_becomes_a_rank() -> None:
    environ = step()
    assert env.adopt(environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [environ[name] for name in names] == ["3", "5", "1", "2"]
    assert "MASTER_PORT" not in environ


@pytest.mark.parametrize(
    ("node", "local_world"), [("0", "2"), ("1", "2"), ("2", "1")], ids=["first", "second", "last"]
)
def test_processes_are_counted_node_by_node(node: str, local_world: str) -> None:
    environ = step(SLURM_NODEID=node)
    env.adopt(environ)
    assert environ["LOCAL_WORLD_SIZE"] == local_world


def test_ranks_of_one_node_meet_on_the_loopback() -> None:
    environ = step(SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="5", MASTER_ADDR="unknown.invalid")
    env.adopt(environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {key: value for key, value in step().items() if key != "SLURM_STEP_ID"},  # a batch script
        step(RANK="0"),  # torchrun under srun
    ],
    ids=["workstation", "batch script", "torchrun"],
)
def test_other_processes_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not env.adopt(environ)
    assert environ == before


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_variable_that_makes_no_sense_is_named(name: str) -> None:
    with pytest.raises(ClusterError, match=f"{name} is 'x'"):
        env.adopt(step(**{name: "x"}))


def test_the_interface_that_leads_to_a_host() -> None:
    loopback = env.interface_towards("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert env.interface_towards("no-such-host.invalid") is None


def test_private_files_go_with_the_rank(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path), "SLURM_JOB_ID": "17", "TRITON_CACHE_DIR": "/kept"}
    left = tmp_path / "vectorlm-17-0-left"
    left.mkdir()
    other = tmp_path / "vectorlm-18-0-other"
    other.mkdir()
    with env.private_folder(environ) as folder:
        assert not left.exists(), "an earlier start of the rank was killed"
        other.rmdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert environ["TMPDIR"] == str(folder)
        assert environ["TRITON_CACHE_DIR"] == "/kept"
        assert Path(environ["TORCHINDUCTOR_CACHE_DIR"]).parent == folder
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_private_files(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match="no temporary folder can be made in"),
        env.private_folder({"TMPDIR": str(tmp_path / "absent")}),
    ):
        pass
