"""Ranks find the store of their own start, whoever else is at the ports."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vectorlm.cluster import meeting
from vectorlm.errors import ClusterError

NAME = "cluster.4242.0.0"


def test_starts_of_one_job_and_jobs_do_not_meet_each_other() -> None:
    names = [
        meeting.meeting_name(
            {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": count}
        )
        for job in ("17", "18")
        for step in ("0", "1")
        for count in ("0", "1")
    ]
    assert len(set(names)) == len(names)
    for name in names:
        ports = meeting.meeting_ports(name)
        assert len(set(ports)) == meeting.CANDIDATES
        assert set(ports) <= set(meeting.PORTS)
    assert len({tuple(meeting.meeting_ports(name)) for name in names}) == len(names)


@contextmanager
def server(port: int, answer: bytes | None) -> Iterator[None]:
    """Another program at a port: it says something, or (None) nothing at all."""
    with socket.create_server(("", port)) as listening:

        def serve() -> None:
            while True:
                try:
                    guest, _ = listening.accept()
                except OSError:
                    return
                if answer is not None:
                    with guest:
                        guest.sendall(answer)
                else:
                    silent.append(guest)

        silent: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield
        listening.shutdown(socket.SHUT_RDWR)
        for guest in silent:
            guest.close()


def test_ranks_meet_although_others_are_at_their_first_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "ANSWER_S", 0.3)
    ports = meeting.meeting_ports(NAME)
    with (
        server(ports[0], b"cluster.4241.0.0 999\n"),
        server(ports[1], None),
        server(ports[2], b""),
        server(ports[3], b"\xff" * 1000),
        server(ports[4], f"{NAME} none\n".encode()),
    ):
        thread = meeting.announce(NAME, 31234, guests=2)
        with socket.create_connection(("127.0.0.1", ports[5])):  # looks in, and leaves
            pass
        assert [meeting.ask("127.0.0.1", NAME, limit_s=30) for _ in range(2)] == [31234, 31234]
        thread.join(timeout=10)
        assert not thread.is_alive(), "it should listen no longer than it has guests"


def test_a_first_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    with pytest.raises(ClusterError, match=r"the first rank, on 127\.0\.0\.1, was not there"):
        meeting.ask("127.0.0.1", "cluster.4243.0.0", limit_s=0.3)


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "CANDIDATES", 1)
    (port,) = meeting.meeting_ports(NAME)
    with (
        socket.create_server(("", port)),
        pytest.raises(ClusterError, match=f"the ports {port} are all in use; set MASTER_PORT"),
    ):
        meeting.announce(NAME, 1, guests=1)
