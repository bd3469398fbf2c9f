"""Who is there, and can be reached, before anything waits for all. Floor 1.

Called with the store at which the ranks meet (torch's, but any with set, wait, check and multi_get
will do), by all of them alike. Without it a rank that never came, or an interface that leads
nowhere, is half an hour of silence and then a time-out that names nobody.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

from vectorlm.cluster import slurm
from vectorlm.errors import ClusterError
from vectorlm.machine import reason
from vectorlm.preflight import Network

PATIENCE_S = 20.0
CONNECT_S = 5.0
READING_S = 3.0
ANSWERING_S = 0.02  # for the store to tell all
MOST_TOLD = 8


class Store(Protocol):
    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


@dataclass(frozen=True)
class Presence:
    """What a rank says when it is called."""

    rank: int
    node: str
    interface: str | None = None
    address: str | None = None
    port: int | None = None  # where the first rank of a node listens
    token: str = ""
    absent: str | None = None  # an interface that it should take and has not
    problems: tuple[str, ...] = ()  # in reaching others


def roll_call(
    store: Store, name: str, me: Presence, world: int, limit_s: float = PATIENCE_S
) -> list[Presence]:
    """What every rank says, in rank order; ClusterError that names those who do not answer.

    With a limit beyond PATIENCE_S (libraries load slowly on a cold node) they are named by then.
    """
    keys = [f"roll/{name}/{rank}" for rank in range(world)]
    store.set(keys[me.rank], json.dumps(asdict(me)))
    patience_s = min(limit_s, PATIENCE_S)
    if not _all_there(store, keys, patience_s):
        heard = _heard(store, keys)
        if limit_s > patience_s and heard and heard[0].rank == me.rank:
            print(f"waiting for {_absent(heard, world)}", file=sys.stderr, flush=True)
        if limit_s == patience_s or not _all_there(store, keys, limit_s - patience_s):
            heard = _heard(store, keys)
            if len(heard) < world:
                raise _refusal(store, name, me.rank, heard, _not_there(heard, world, limit_s))
    return _said(store, keys)


def _all_there(store: Store, keys: list[str], limit_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=limit_s))
    except RuntimeError:  # as torch's stores say that time is up
        return False
    return True


def _refusal(
    store: Store, name: str, rank: int, there: Sequence[Presence], text: str
) -> ClusterError:
    """What every rank raises, said once, and when all have read it: the first rank takes the store
    with it, and srun ends the ranks that are still there when one has left.
    """
    if rank == there[0].rank:
        print(text, file=sys.stderr, flush=True)
    with suppress(RuntimeError):
        store.set(f"roll/{name}/read/{rank}", "")
        keys = [f"roll/{name}/read/{one.rank}" for one in there]
        store.wait(keys, timedelta(seconds=READING_S))
    if rank == 0:
        time.sleep(ANSWERING_S)
    error = ClusterError(text)
    error.said = True
    return error


def _heard(store: Store, keys: list[str]) -> list[Presence]:
    return _said(store, [key for key in keys if store.check([key])])


def _said(store: Store, keys: list[str]) -> list[Presence]:
    return [Presence(**json.loads(said)) for said in store.multi_get(keys)]


def _absent(heard: Sequence[Presence], world: int) -> str:
    absent = sorted(set(range(world)) - {one.rank for one in heard})
    silent = [node for node in _nodes_of_step() if node not in {one.node for one in heard}]
    where = f" (no rank of {', '.join(silent)} is there)" if silent else ""
    return f"rank {', '.join(map(str, absent))} of {world}{where}"


def _not_there(heard: Sequence[Presence], world: int, limit_s: float) -> str:
    there = ", ".join(sorted({one.node for one in heard}))
    return (
        f"{_absent(heard, world)} did not answer within {limit_s:.0f} s, while those on {there} "
        "wait; look at the log of the ranks that are missing, and whether their node can reach the "
        "others"
    )


def _nodes_of_step() -> list[str]:
    listed = os.environ.get("SLURM_STEP_NODELIST")
    if listed is None:
        return []
    try:
        return slurm.call(["scontrol", "show", "hostnames", listed]).split()
    except ClusterError:
        return []


def meet(
    store: Store, rank: int, world: int, node: str, here: Network, limit_s: float = PATIENCE_S
) -> None:
    """Whether all ranks are there, and their nodes can connect over the interfaces they will use.

    The first rank of each node listens; the first of all calls every node, and each the next one.
    ClusterError names the ranks, or the nodes and their interfaces.
    """
    with _Listener(here.address) as listener:
        me = Presence(
            rank, node, here.interface, here.address, listener.port, listener.token, here.absent
        )
        firsts: dict[str, Presence] = {}
        for one in roll_call(store, "meet", me, world, limit_s):
            firsts.setdefault(one.node, one)
        problems = _call_others(me, list(firsts.values()))
        told = roll_call(store, "met", Presence(rank, node, problems=tuple(problems)), world)
    found = [problem for one in told for problem in one.problems]
    if found:
        raise _refusal(store, "met", rank, told, _no_way(found))


def _no_way(problems: Sequence[str]) -> str:
    more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
    return (
        f"{'; '.join([*problems[:MOST_TOLD], *more])}. Set slurm.network_interface, or "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, to an interface that every node has and that "
        "connects them, and look for a firewall"
    )


def _call_others(me: Presence, firsts: list[Presence]) -> list[str]:
    at = next((at for at, one in enumerate(firsts) if one.rank == me.rank), None)
    if at is None:
        return []
    if me.absent:
        return [f"{me.node} has no network interface {me.absent}"]
    called = firsts if at == 0 else firsts[(at + 1) % len(firsts) :][:1]
    others = [one for one in called if one.node != me.node and one.port is not None]
    if not others:
        return []
    with ThreadPoolExecutor(len(others)) as callers:
        return [why for why in callers.map(lambda other: _call(me, other), others) if why]


def _call(me: Presence, other: Presence) -> str | None:
    """None when the other answers with its own token: 127.0.0.1 would be me."""
    assert other.address is not None
    assert other.port is not None
    try:
        with socket.create_connection((other.address, other.port), timeout=CONNECT_S) as line:
            if line.recv(64).decode(errors="replace") == other.token:
                return None
            why = "another program answers"
    except OSError as error:
        why = reason(error)
    return (
        f"{me.node} cannot reach {other.node} at {other.address} (interface {other.interface} "
        f"there, {me.interface} here): {why}"
    )


class _Listener:
    """Answers every caller with a token, at a port of an address of this machine."""

    def __init__(self, address: str | None) -> None:
        self.token = secrets.token_hex(16)
        self.port: int | None = None
        self._socket: socket.socket | None = None
        if address:
            with suppress(OSError):
                self._socket = socket.create_server((address, 0), backlog=256)
                self.port = self._socket.getsockname()[1]

    def __enter__(self) -> _Listener:
        if self._socket:
            threading.Thread(target=self._answer, args=(self._socket,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._socket:
            with suppress(OSError):  # wakes the thread
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _answer(self, listening: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = listening.accept()
                with caller:
                    caller.settimeout(CONNECT_S)
                    caller.sendall(self.token.encode())
