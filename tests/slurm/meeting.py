"""What each rank does in the tests of ranks that cannot meet: `python -m tests.slurm.meeting CASE`.

It prints what the meeting said.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from vectorlm.cluster import env, meeting
from vectorlm.errors import ClusterError

LIMIT_S = 60.0


def main(case: str) -> None:
    second_node = os.environ["SLURM_NODEID"] == "1"
    if case == "loopback":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if case == "absent" and second_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "eth9"
    if case == "missing" and second_node:
        return
    env.adopt()
    import torch.distributed as dist

    from vectorlm import machine
    from vectorlm.cluster.rollcall import meet

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, name = os.environ["MASTER_ADDR"], meeting.meeting_name()
    if rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        meeting.announce(name, store.port, world - 1)
    else:
        port = meeting.ask(host, name, LIMIT_S)
        store = dist.TCPStore(host, port, world, timeout=timedelta(seconds=LIMIT_S))
    limit_s = 2.0 if case == "missing" else LIMIT_S
    try:
        meet(store, rank, world, machine.node_name(), machine.network(False), limit_s)
        print(f"rank {rank}: all met", flush=True)
        if rank == 0:
            time.sleep(1.0)  # with the store, until the other has read
    except ClusterError as error:
        print(f"rank {rank}: {error}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
