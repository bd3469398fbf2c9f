"""How the ranks of a start find each other. Floor 1, used by `distributed`.

The store that ranks share lies at a port that the system chose, so no two jobs can want the same.
The first rank tells it to whoever asks at the first free one of a few ports that follow from the
job's name; the others ask at each of them for their own job.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from vectorlm.errors import ClusterError

# Below the range that systems hand out by themselves, above that of system services.
PORTS = range(10000, 20000)
CANDIDATES = 16
ANSWER_S = 3.0
LONGEST_ANSWER = 300


def meeting_name(environ: Mapping[str, str] = os.environ) -> str:
    """What tells the ranks of this start from those of any other, also of an earlier start."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(environ.get(name, "0") for name in names)


def meeting_ports(name: str) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    step = 1 + seed // len(PORTS) % (len(PORTS) // CANDIDATES)
    return [PORTS[(seed + i * step) % len(PORTS)] for i in range(CANDIDATES)]


def announce(name: str, store_port: int, guests: int) -> threading.Thread:
    """Tell so many ranks where the store is; in a thread, while this rank goes on."""
    listening = _first_free(name)
    answer = f"{name} {store_port}\n".encode()

    def serve() -> None:
        served = 0
        with listening:
            while served < guests:
                with suppress(OSError):
                    guest, _ = listening.accept()
                    with guest:
                        guest.settimeout(ANSWER_S)
                        guest.sendall(answer)
                        served += guest.recv(1) == b"."

    thread = threading.Thread(target=serve, daemon=True, name="meeting")
    thread.start()
    return thread


def _first_free(name: str) -> socket.socket:
    for port in meeting_ports(name):
        with suppress(OSError):  # another program has it
            return socket.create_server(("", port), backlog=1024)
    raise ClusterError(
        f"{socket.gethostname()}: the ports {', '.join(map(str, meeting_ports(name)))} are all in "
        "use; set MASTER_PORT to one that is free"
    )


def ask(host: str, name: str, limit_s: float) -> int:
    """The port of the store, from the first rank on `host`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for port in meeting_ports(name):
            with suppress(OSError, ValueError):
                found = _ask_at(host, port, name)
                if found is not None:
                    return found
        time.sleep(0.1)
    raise ClusterError(
        f"{socket.gethostname()}: the first rank, on {host}, was not there within "
        f"{limit_s / 60:.0f} minutes; did it start, and does a firewall or the wrong MASTER_ADDR "
        "stand between the nodes?"
    )


def _ask_at(host: str, port: int, name: str) -> int | None:
    with socket.create_connection((host, port), timeout=ANSWER_S) as host_socket:
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < LONGEST_ANSWER:
            part = host_socket.recv(LONGEST_ANSWER)
            if not part:
                return None
            answer += part
        said, _, store_port = answer.decode().rpartition(" ")
        if said != name:
            return None
        host_socket.sendall(b".")
        return int(store_port)
