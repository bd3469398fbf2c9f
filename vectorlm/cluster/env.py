"""What Slurm's variables say of a process: which rank it is, where ranks meet, where its private
files go. Floor 1; called by the doors before torch is imported.

srun starts one process a GPU. Nothing stands between Slurm and a rank, so signals reach it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from vectorlm.cluster import slurm
from vectorlm.errors import ClusterError

SIOCGIFADDR = 0x8915
CACHES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "CUDA_CACHE_PATH",
)
Environ = MutableMapping[str, str]


def started_by_srun(environ: Environ = os.environ) -> bool:
    """A step's process has SLURM_STEP_ID, the batch script's own has not; torchrun sets RANK."""
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and "RANK" not in environ


def adopt(environ: Environ = os.environ) -> bool:
    """Make this process the rank as which srun started it; False if srun did not."""
    if not started_by_srun(environ):
        return False
    world = _number(environ, "SLURM_STEP_NUM_TASKS")
    environ["WORLD_SIZE"] = str(world)
    environ["LOCAL_RANK"] = str(_number(environ, "SLURM_LOCALID"))
    environ["LOCAL_WORLD_SIZE"] = str(_local_world(environ))
    if environ["LOCAL_WORLD_SIZE"] == str(world):
        environ["MASTER_ADDR"] = "127.0.0.1"  # needs no name to resolve and no network
    else:
        if "MASTER_ADDR" not in environ:
            environ["MASTER_ADDR"] = _first_host(environ)
        _choose_interface(environ)
    _limit_threads(environ)
    environ["RANK"] = str(_number(environ, "SLURM_PROCID"))
    return True


def _number(environ: Environ, name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ClusterError(
            f"the environment variable {name} is {text!r}; srun sets it to a number: start the "
            "ranks with srun, as the scripts in examples/ do"
        )
    return int(text)


def _local_world(environ: Environ) -> int:
    """Processes on this node, from `4(x2),3` and the node's place in the list."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = _number(environ, "SLURM_NODEID")
    if node >= len(counts):
        raise ClusterError(
            "the environment variable SLURM_STEP_TASKS_PER_NODE is "
            f"{environ.get('SLURM_STEP_TASKS_PER_NODE', '')!r}, which says nothing of node {node}; "
            "start the ranks with srun, as the scripts in examples/ do"
        )
    return counts[node]


def _first_host(environ: Environ) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    return slurm.call(["scontrol", "show", "hostnames", nodes]).split()[0]


def _limit_threads(environ: Environ) -> None:
    """Ranks of a node share its cores; torch would take all of them for each."""
    with suppress(AttributeError):  # not on macOS
        cores = len(os.sched_getaffinity(0))
        share = max(1, cores // int(environ["LOCAL_WORLD_SIZE"]))
        environ.setdefault("OMP_NUM_THREADS", environ.get("SLURM_CPUS_PER_TASK", str(share)))


# --- the network ---------------------------------------------------------------------------------


def _choose_interface(environ: Environ) -> None:
    """gloo takes the interface of the host's own name, which is often the loopback's."""
    if "GLOO_SOCKET_IFNAME" in environ:
        return
    name = interface_towards(environ["MASTER_ADDR"])
    if name:
        environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str | None:
    """The network interface that reaches `host`; None if that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            address = socket.gethostbyname(host)
            if address in own_addresses():  # the route to oneself is the loopback
                return own_addresses()[address]
            probe.connect((address, 9))  # sends nothing
            return own_addresses().get(probe.getsockname()[0])
    except OSError:
        return None


def own_addresses() -> dict[str, str]:
    """The IPv4 addresses of this machine and the interface of each."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found.setdefault(socket.inet_ntoa(answer[20:24]), name)
    return found


# --- private files --------------------------------------------------------------------------------


@contextmanager
def private_folder(environ: Environ = os.environ) -> Iterator[Path]:
    """A temporary folder that only this rank's user can enter, for its files and caches."""
    base = environ.get("SLURM_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    prefix = f"vectorlm-{environ.get('SLURM_JOB_ID', '0')}-{environ.get('RANK', '0')}-"
    for left in Path(base).glob(f"{prefix}*"):  # by an earlier start that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    except OSError as error:
        raise ClusterError(
            f"{socket.gethostname()}: no temporary folder can be made in {base} ({error}); make "
            "room there, or set TMPDIR to a folder that exists on every node"
        ) from error
    environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # it is remembered from before
    for name in CACHES:
        environ.setdefault(name, str(folder / name.lower()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def as_rank() -> Iterator[None]:
    """This process is the rank that srun, or else torchrun, has made of it."""
    with private_folder() if adopt() else nullcontext():
        yield


def flight_folder(output_dir: str | Path) -> Path:
    """Where the flight recorders of this start's ranks write what NCCL did last."""
    name = os.environ.get("SLURM_JOB_ID", "local")
    return Path(output_dir) / "flight-recorder" / f"{name}.{slurm.restarts()}"


def record_flights(output_dir: str | Path, environ: Environ = os.environ) -> None:
    """Have NCCL keep its last operations, and write them when one of them times out."""
    folder = flight_folder(output_dir)
    with suppress(OSError):  # training does not need it
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
    environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))
