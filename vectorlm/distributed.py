"""The ranks of a run: who they are, how they reach each other, and what they agree on. Floor 2."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vectorlm.cluster.meeting import announce, ask, meeting_name
from vectorlm.cluster.rollcall import meet
from vectorlm.errors import ClusterError, VectorLMError
from vectorlm.machine import network, node_name

T = TypeVar("T")
ARRIVAL_S = 300.0  # imports from a cold network file system
HEARING_S = 3.0


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)
    group: dist.ProcessGroup | None = None  # None: the one that all ranks have from the start

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, in double precision, the same bits everywhere. On the host, so that
        a GPU is not waited for.
        """
        tensor = torch.tensor(values, dtype=torch.float64)
        self.add_up(tensor)
        return tensor.tolist()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Make it the sum over ranks, where it is."""
        dist.all_reduce(tensor, group=self.group)

    def gather(self, value: T) -> list[T]:
        """What every rank gave, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """What the first rank gave."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def apart(self) -> Ranks:
        """The same ranks on lines of their own, for a thread beside the one that trains."""
        group = dist.new_group(timeout=self.timeout, backend="gloo")
        return replace(self, device=torch.device("cpu"), group=group)

    def say_once(self, text: str, say: Callable[[str], None]) -> None:
        """Ranks that fail alike say so once, and none leaves before it is said: with the first to
        leave, srun ends the others.
        """
        store = dist.distributed_c10d._get_default_store()
        key = f"said/{hashlib.sha1(text.encode()).hexdigest()}"
        try:
            speaks = store.add(key, 1) == 1
        except (RuntimeError, dist.DistError):  # the first rank, which holds the store, has left
            say(text)
            return
        with suppress(RuntimeError, dist.DistError):
            if speaks:
                say(text)
                store.set(f"{key}/done", "1")
            else:
                store.wait([f"{key}/done"], timedelta(seconds=HEARING_S))
            heard = store.add(f"{key}/heard", 1)
            deadline = time.monotonic() + HEARING_S
            while self.first and heard < self.world and time.monotonic() < deadline:
                time.sleep(0.01)
                heard = store.add(f"{key}/heard", 0)

    def barrier(self) -> None:
        self.sum([0.0])

    def together(self, work: Callable[[], T]) -> T:
        """Run rank-local `work`; if it fails for the user's reasons on any rank, it fails on
        all.
        """
        result, problem = None, None
        try:
            result = work()
        except VectorLMError as error:
            problem = error
        problems = self.gather(None if problem is None else str(problem))
        failed = {i: text for i, text in enumerate(problems) if text is not None}
        if failed:
            raise type(problem or VectorLMError())(_one_message(failed, self.world))
        return result  # type: ignore[return-value]


def _one_message(failed: dict[int, str], world: int) -> str:
    if len(set(failed.values())) == 1 and (len(failed) == world or set(failed) == {0}):
        return next(iter(failed.values()))
    return "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())


def connect(timeout_minutes: int) -> Ranks:
    """Join the process group that the environment names (torchrun's variables), or be the only
    rank.
    """
    rank, world = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    local_rank, local_world = _variable("LOCAL_RANK", rank), _variable("LOCAL_WORLD_SIZE", world)
    device = _device(local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        # A host's own name need not resolve; ranks of one machine meet on the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if _has_interface("lo") else "lo0")
    try:
        if world == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        elif "MASTER_PORT" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = _meet(rank, world, timeout)
            if local_world < world:
                meet(store, rank, world, node_name(), network(device.type == "cuda"), ARRIVAL_S)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=timeout
            )
    except (RuntimeError, ValueError, dist.DistError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ClusterError(
            f"rank {rank} of {world} cannot reach the others at {where}: {error}; check "
            "MASTER_ADDR, MASTER_PORT and the network interface (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)"
        ) from error
    return Ranks(rank, world, local_rank, local_world, device, timeout)


def _meet(rank: int, world: int, timeout: timedelta) -> dist.Store:
    host, name = os.environ["MASTER_ADDR"], meeting_name()
    if rank > 0:
        return dist.TCPStore(host, ask(host, name, timeout.total_seconds()), world, timeout=timeout)
    store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
    announce(name, store.port, world - 1)
    return store


def rank_left(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "gloo/transport" in text or "remote process" in text
    )


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ClusterError(
            f"the environment variable {name} is {text!r}; it must be a number"
        ) from None


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ:
        local_rank = 0  # Slurm shows each process its own GPU alone
    if local_rank >= count:
        raise ClusterError(
            f"local rank {local_rank} has no GPU: this node shows {count}; start one process a GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _has_interface(name: str) -> bool:
    return any(name == found for _, found in socket.if_nameindex())
