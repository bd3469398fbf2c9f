"""The cluster that entries of Slurm ask: large nodes, and partitions that hold something back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.slurm.lab import Lab

PARTITIONS = ("short MaxTime=00:30:00", "single MaxNodes=1", "closed State=DOWN")
SIZE = {"MEM": "500000", "ENFORCE": "associations,limits,qos"}  # read by up.sh
RESERVATION = "ReservationName=workshop StartTime=now+7days Duration=60 Users=root Nodes=n1"
ACCOUNTS = (
    "add qos quick set MaxWall=60 MaxTRESPerUser=gres/gpu=2",
    "modify user root set qos+=quick",
)


@contextmanager
def large_lab() -> Iterator[Lab]:
    """Nodes n1 and n2 with 64 CPUs, 500,000 MB and four GPUs of type a100 each."""
    lab = _large()
    try:
        for partition in PARTITIONS:
            name, limit = partition.split()
            lab.run("scontrol", "create", f"PartitionName={name}", "Nodes=n[1-2]", limit)
        lab.run("scontrol", "update", "NodeName=n1", "Features=ib,nvlink")
        lab.run("scontrol", "create", "reservation", *RESERVATION.split())
        for change in ACCOUNTS:
            lab.run("sacctmgr", "-i", *change.split())
        yield lab
    finally:
        lab.close()


def _large() -> Lab:
    before = dict(os.environ)
    os.environ.update(SIZE)
    try:
        return Lab(accounting=True, cpus=64)
    finally:
        os.environ.clear()
        os.environ.update(before)
