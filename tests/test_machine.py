"""What a machine says of itself: folders, memory, cores, network."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from vectorlm import machine


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- limits ----------------------------------------------------------------------------


def test_within_a_limit() -> None:
    assert machine.within(5, lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        machine.within(5, lambda: {}["x"])


def test_beyond_the_limit() -> None:
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        machine.within(0.2, lambda: release.wait(30))
    assert time.monotonic() - began < 5
    release.set()


# --- folders ---------------------------------------------------------------------------


def test_folder_with_room(tmp_path: Path) -> None:
    found = machine.look_at(str(tmp_path))
    assert found.problem is None
    assert found.free_bytes
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    found = machine.look_at(str(tmp_path / "no"))
    assert (found.problem, found.free_bytes) == ("No such file or directory", None)


def test_folder_that_cannot_be_written() -> None:
    """Also by root: nothing can be made in /proc."""
    assert machine.look_at("/proc").problem
    assert machine.look_at("/proc", writes=False).problem is None


def test_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()
    monkeypatch.setattr(machine, "FOLDER_S", 0.2)
    monkeypatch.setattr(machine, "_look_at", lambda path, writes: release.wait(30))
    assert machine.look_at(str(tmp_path)).problem == "no answer within 0 s"
    release.set()


def test_file_that_appears(tmp_path: Path) -> None:
    late = tmp_path / "late"
    threading.Timer(0.3, late.touch).start()
    assert machine.appears(late, limit_s=10)
    assert not machine.appears(tmp_path / "never", limit_s=0.1)


# --- memory and cores ------------------------------------------------------------------


MEMINFO = "MemTotal:       32768000 kB\nMemAvailable:   16384000 kB\n"


def test_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "meminfo", MEMINFO)
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: iter(()))
    assert machine.free_host_bytes(tmp_path / "meminfo") == 16384000 * 1024
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: iter([(10 << 30, 3 << 30)]))
    assert machine.free_host_bytes(tmp_path / "meminfo") == 7 << 30
    monkeypatch.setattr(machine, "_cgroup_limits", lambda: iter([(10, 30)]))
    assert machine.free_host_bytes(tmp_path / "meminfo") == 0


def test_limits_of_a_job_and_what_is_around_it(tmp_path: Path) -> None:
    """cgroup v2: cached files count as free; `max` is no limit."""
    for name, limit, used in (("job/step", "max", "900"), ("job", "2000", "1000"), ("", "max", "")):
        write(tmp_path / name / "memory.max", f"{limit}\n")
        write(tmp_path / name / "memory.current", f"{used}\n")
        write(tmp_path / name / "memory.stat", "anon 5\ninactive_file 100\nactive_file 50\n")
    write(tmp_path / "own", "0::/job/step\n")
    assert list(machine._cgroup_limits(tmp_path, tmp_path / "own")) == [(2000, 850)]


def test_limits_of_the_older_kind(tmp_path: Path) -> None:
    step = tmp_path / "memory/slurm/step_0"
    write(step / "memory.limit_in_bytes", "4000\n")
    write(step / "memory.usage_in_bytes", "1000\n")
    write(step / "memory.stat", "active_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n")
    write(tmp_path / "own", "9:cpu:/x\n4:memory:/slurm/step_0\n0::/\n")
    assert list(machine._cgroup_limits(tmp_path, tmp_path / "own")) == [(4000, 700)]


def test_this_machine() -> None:
    assert machine.free_host_bytes() > 1 << 20
    assert set(machine.usable_cores()) == os.sched_getaffinity(0)


def test_gpu_driver(tmp_path: Path) -> None:
    path = tmp_path / "version"
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build"
    for line, version in ((closed, "535.104.05"), (opened, "550.54.14"), ("none", None)):
        path.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
        assert machine.gpu_driver(path) == version
    assert machine.gpu_driver(tmp_path / "no") is None


# --- network ---------------------------------------------------------------------------


def test_interface_towards_the_first_rank() -> None:
    found = machine.network(False, {"MASTER_ADDR": "127.0.0.1"})
    assert (found.interface, found.address, found.absent) == ("lo", "127.0.0.1", None)
    assert "lo" not in found.interfaces
    assert machine.network(False, {}).interface is None


def test_interface_that_was_chosen() -> None:
    assert machine.network(False, {"GLOO_SOCKET_IFNAME": "lo"}).address == "127.0.0.1"
    found = machine.network(False, {"GLOO_SOCKET_IFNAME": "nic9"})
    assert (found.interface, found.address, found.absent) == ("nic9", None, "nic9")


@pytest.mark.parametrize(
    ("asked", "absent"),
    [
        ("nic", "nic"),
        ("nic,lo", None),
        ("l", None),  # NCCL takes names that begin so
        ("=l", "l"),
        ("=lo", None),
        ("^nic", None),
    ],
)
def test_interface_that_nccl_is_told_to_take(asked: str, absent: str | None) -> None:
    assert {"lo"} <= {name for _, name in socket.if_nameindex()}
    assert machine.network(True, {"NCCL_SOCKET_IFNAME": asked}).absent == absent
    assert machine.network(False, {"NCCL_SOCKET_IFNAME": asked}).absent is None


def test_speed_of_an_interface(tmp_path: Path) -> None:
    """Bridges and their like claim speeds that mean nothing."""
    write(tmp_path / "eth0/speed", "25000\n")
    (tmp_path / "eth0/device").mkdir()
    write(tmp_path / "bond0/speed", "50000\n")
    (tmp_path / "bond0/bonding").mkdir()
    write(tmp_path / "docker0/speed", "10000\n")
    write(tmp_path / "eth1/speed", "-1\n")
    (tmp_path / "eth1/device").mkdir()
    write(tmp_path / "ib0/device/infiniband/mlx5_0/ports/1/rate", "200 Gb/sec (4X HDR)\n")
    speeds = [machine.interface_mbits(n, tmp_path) for n in ("eth0", "bond0", "docker0", "eth1")]
    assert speeds == [25000, 50000, None, None]
    assert machine.interface_mbits("ib0", tmp_path) == 200_000


def test_active_infiniband(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "mlx5_0/ports/1/state", "4: ACTIVE\n")
    write(tmp_path / "mlx5_1/ports/1/state", "1: DOWN\n")
    assert machine.active_infiniband(tmp_path) == ["mlx5_0"]
    monkeypatch.setattr(machine, "active_infiniband", lambda: ["mlx5_0"])
    assert machine.network(True, {}).infiniband
    assert machine.network(True, {"NCCL_IB_DISABLE": "0"}).infiniband
    assert not machine.network(True, {"NCCL_IB_DISABLE": "1"}).infiniband


def test_node_is_called_as_slurm_calls_it() -> None:
    assert machine.node_name({"SLURMD_NODENAME": "gpu07"}) == "gpu07"
    assert machine.node_name({}) == socket.gethostname()
