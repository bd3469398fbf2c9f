"""What this machine says of itself: memory, folders, network, cores. Floor 1, called by `measure`.

Nothing here may hang a job: what can (a file system that does not answer) is asked within a limit.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vectorlm.cluster.env import interface_towards, own_addresses
from vectorlm.preflight import Folder, Network

T = TypeVar("T")
FOLDER_S = 10.0  # for a file system to answer
POLL_S = 0.2
PROBE = b"\0" * 4096
NET = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")
CGROUPS = Path("/sys/fs/cgroup")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError when it takes longer, and goes on for itself."""
    results: list[T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as problem:  # raised again below
            problems.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if problems:
        raise problems[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    return results[0]


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """As Slurm calls this node, so that a name in a message is one to exclude."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


# --- folders --------------------------------------------------------------------------------------


def look_at(path: str, writes: bool = True) -> Folder:
    """How much room a folder has, and whether a file can be written into it."""
    try:
        return within(FOLDER_S, lambda: _look_at(path, writes))
    except (OSError, TimeoutError) as error:
        return Folder(path, problem=reason(error))


def _look_at(path: str, writes: bool) -> Folder:
    found = os.statvfs(path)
    folder = Folder(
        path,
        free_bytes=found.f_bavail * found.f_frsize,
        free_files=found.f_favail if found.f_files else None,
    )
    if writes:
        probe = Path(path) / f".preflight-{secrets.token_hex(8)}"
        try:
            write_private(probe, PROBE)
        finally:
            probe.unlink(missing_ok=True)
    return folder


def write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a quota may be noticed only now


def appears(path: Path, limit_s: float) -> bool:
    """Whether a file that another node has written is here; network file systems take a while."""
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(POLL_S)
    return True


def reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# --- memory, cores, software ----------------------------------------------------------------------


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What this process and its kin may still take: the machine's, or what its cgroup leaves."""
    free = [limit - used for limit, used in _cgroup_limits()]
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)
        free += [int(found[1]) << 10] if found else []
    return max(0, min(free, default=0))


def _cgroup_limits(
    root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, used) of this process's memory cgroup and those around it, where there is a limit.

    Cached files count as free: the system drops them when memory is short.
    """
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                yield from _limits(root / "memory", path, "memory.limit_in_bytes", "usage_in_bytes")
            elif not controllers:
                yield from _limits(root, path, "memory.max", "current")


def _limits(root: Path, path: str, limit: str, used: str) -> Iterator[tuple[int, int]]:
    own = root / path.strip("/")
    for folder in (own, *own.parents):
        with suppress(OSError, ValueError):
            stat = (folder / "memory.stat").read_text()
            cached = re.findall(
                r"^total_(?:in)?active_file (\d+)", stat, re.M
            )  # with those below it
            cached = cached or re.findall(r"^(?:in)?active_file (\d+)", stat, re.M)
            most = int((folder / limit).read_text())  # ValueError: "max"
            yield most, int((folder / f"memory.{used}").read_text()) - sum(map(int, cached))
        if folder == root:
            return


def usable_cores() -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except AttributeError:  # not on macOS
        return tuple(range(os.cpu_count() or 1))


def gpu_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text().splitlines()[0])
    except (OSError, IndexError):
        return None
    return found[0] if found else None


# --- network --------------------------------------------------------------------------------------


def network(uses_nccl: bool, environ: Mapping[str, str] = os.environ) -> Network:
    """The interface over which gloo, and NCCL without InfiniBand, talk to the other nodes."""
    addresses = {name: address for address, name in own_addresses().items()}
    there = {name for _, name in socket.if_nameindex()}
    asked = environ.get("GLOO_SOCKET_IFNAME") or None
    master = environ.get("MASTER_ADDR")
    name = asked.split(",")[0] if asked else interface_towards(master) if master else None
    return Network(
        interface=name,
        address=addresses.get(name or ""),
        interfaces={found: interface_mbits(found) for found in addresses if found != "lo"},
        absent=_absent(uses_nccl, environ, there),
        infiniband=environ.get("NCCL_IB_DISABLE", "0") in ("", "0") and bool(active_infiniband()),
    )


def _absent(uses_nccl: bool, environ: Mapping[str, str], there: set[str]) -> str | None:
    """An interface that gloo or NCCL is told to take, and that this machine does not have."""
    for name in environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if name and name not in there:
            return name
    asked = environ.get("NCCL_SOCKET_IFNAME", "")
    if not uses_nccl or not asked or asked.startswith("^"):
        return None
    names = asked.removeprefix("=").split(",")
    for name in names:
        fits = there & {name} if asked.startswith("=") else [n for n in there if n.startswith(name)]
        if fits:
            return None
    return ",".join(names)


def interface_mbits(name: str, root: Path = NET) -> int | None:
    """As the driver says; of InfiniBand as its port says; None of bridges and their like."""
    if not ((root / name / "device").exists() or (root / name / "bonding").exists()):
        return None
    with suppress(OSError, ValueError):
        mbits = int((root / name / "speed").read_text())
        if mbits > 0:
            return mbits
    for rate in (root / name / "device" / "infiniband").glob("*/ports/*/rate"):
        with suppress(OSError, ValueError):
            return int(float(rate.read_text().split()[0]) * 1000)  # "100 Gb/sec (4X EDR)"
    return None


def active_infiniband(root: Path = INFINIBAND) -> list[str]:
    """Its adapters with a port that is up (Ethernet adapters that speak RDMA are among them)."""
    found = []
    for state in root.glob("*/ports/*/state"):
        with suppress(OSError):
            if "ACTIVE" in state.read_text():
                found.append(state.parts[-4])
    return sorted(set(found))
