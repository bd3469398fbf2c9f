"""Ranks that do not come, and nodes that cannot reach each other, are named."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch.distributed as dist

from vectorlm.cluster import rollcall
from vectorlm.cluster.rollcall import Presence, meet, roll_call
from vectorlm.errors import ClusterError
from vectorlm.preflight import Network

T = TypeVar("T")
LOOPBACK = Network("lo", "127.0.0.1")


def as_ranks(ranks: list[int], work: Callable[[dist.Store, int], T]) -> list[T | str]:
    """What each rank returned, or the message with which it left; each with a store of its own."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def as_rank(rank: int) -> T | str:
        store = dist.TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=60))
        try:
            return work(store, rank)
        except ClusterError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(as_rank, ranks))


def node(rank: int) -> str:
    return "ab"[rank // 2]


def test_everyone_hears_everyone() -> None:
    heard = as_ranks([0, 1, 2, 3], lambda s, r: roll_call(s, "x", Presence(r, node(r)), 4))
    assert all(isinstance(one, list) for one in heard)
    assert [[(p.rank, p.node) for p in one] for one in heard if isinstance(one, list)] == [
        [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    ] * 4


def test_missing_ranks_are_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "_nodes_of_step", lambda: ["a", "b"])
    began = time.monotonic()
    said = as_ranks([0, 1], lambda s, r: roll_call(s, "x", Presence(r, node(r)), 4, 1.0))
    assert time.monotonic() - began < 10
    assert said[0] == said[1]
    assert "rank 2, 3 of 4 (no rank of b is there) did not answer within 1 s" in str(said[0])
    assert "while those on a wait" in str(said[0])


def test_late_ranks_are_named_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollcall, "PATIENCE_S", 0.5)

    def come(store: dist.Store, rank: int) -> int:
        time.sleep(2.0 if rank == 1 else 0.0)
        return len(roll_call(store, "x", Presence(rank, node(rank)), 3, limit_s=30))

    assert as_ranks([0, 1, 2], come) == [3, 3, 3]
    assert "waiting for rank 1 of 3\n" in capfd.readouterr().err


def met(store: dist.Store, rank: int, ways: dict[str, Network]) -> None:
    meet(store, rank, 4, node(rank), ways[node(rank)], limit_s=20)


def test_nodes_that_reach_each_other() -> None:
    ways = {"a": LOOPBACK, "b": LOOPBACK}
    assert as_ranks([0, 1, 2, 3], lambda s, r: met(s, r, ways)) == [None] * 4


def test_interface_that_leads_nowhere_is_named() -> None:
    """The other node listens where this one cannot call it, as at 127.0.0.1 of another machine."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        me = Presence(0, "a", "lo", "127.0.0.1", 1, "mine")
        they = Presence(2, "b", "lo", "127.0.0.1", port, "theirs")

        def answer() -> None:
            caller, _ = other.accept()
            with caller:
                caller.sendall(b"mine")

        with ThreadPoolExecutor(1) as threads:
            threads.submit(answer)
            why = rollcall._call(me, they)
    said = "a cannot reach b at 127.0.0.1 (interface lo there, lo here): "
    assert why == f"{said}another program answers"
    assert rollcall._call(me, they) == f"{said}Connection refused"


def test_all_ranks_leave_with_what_one_found(capfd: pytest.CaptureFixture[str]) -> None:
    """Said once, though all raise it."""
    absent = Network("nic9", None, absent="nic9")
    said = as_ranks([0, 1, 2, 3], lambda s, r: met(s, r, {"a": LOOPBACK, "b": absent}))
    assert len(set(map(str, said))) == 1
    assert str(said[0]).startswith("b has no network interface nic9. Set slurm.network_interface")
    assert capfd.readouterr().err.count("b has no network interface nic9") == 1


def test_address_that_is_not_known_is_not_called() -> None:
    unknown = {"a": LOOPBACK, "b": Network(None, None)}
    assert as_ranks([0, 1, 2, 3], lambda s, r: met(s, r, unknown)) == [None] * 4
