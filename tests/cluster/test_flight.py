"""Flight recorders: what real ranks wrote is understood, and nothing in a dump is ever run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vectorlm.cluster.flight import LARGEST_BYTES, Flight, Lag, find_lag, read_flights

LIMIT_S = 120
# The recorder is the same code for gloo and NCCL. The second rank stays away from an
# all-reduce that the first has begun.
RANK = """
import os, pickle, sys, time
os.environ["TORCH_FR_BUFFER_SIZE"] = "20"
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace, _dump_fr_trace_json

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
group = dist.new_group([0, 1], group_desc="shards")
dist.all_reduce(torch.zeros(3))
dist.all_reduce(torch.zeros(2, 3), group=group)
if rank == 0:
    work = dist.all_reduce(torch.zeros(5), async_op=True)
def ended():  # the recorder hears of that a moment later
    groups = pickle.loads(_dump_fr_trace())["pg_status"].values()
    return all(group["last_completed_collective"] >= 1 for group in groups)
while not ended():
    time.sleep(0.01)
with open(f"{folder}/dumps/rank_{rank}", "wb") as file:
    file.write(_dump_fr_trace())
with open(f"{folder}/json/rank_{rank}.json", "wb") as file:
    file.write(_dump_fr_trace_json())
if rank == 0:
    open(f"{folder}/written", "w").close()
    work.wait()
else:
    while not os.path.exists(f"{folder}/written"):  # the test ends what waits too long
        time.sleep(0.01)
    dist.all_reduce(torch.zeros(5))
dist.destroy_process_group()  # else gloo's threads may outlive what they need
"""


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recorders of two ranks wrote: pickles, and beside them the same as JSON."""
    folder = tmp_path_factory.mktemp("flight")
    (folder / "dumps").mkdir()
    (folder / "json").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=LIMIT_S) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    return folder / "dumps"


@pytest.mark.parametrize("kind", ["dumps", "json"])
def test_real_dumps_name_the_rank_that_stayed_away(dumps: Path, kind: str) -> None:
    flights = read_flights(dumps.parent / kind)
    assert sorted(flights) == [0, 1]
    assert [flights[rank].waits for rank in range(2)] == [True, False]
    assert {group.description for group in flights[0].groups.values()} == {"default_pg", "shards"}
    lag = find_lag(flights, 2)
    assert lag
    assert (lag.operation.name, lag.operation.number) == ("all_reduce", 2)
    assert (lag.group, lag.waiting, lag.late) == ("all ranks", [0], [1])


def test_rank_without_a_dump_is_late(dumps: Path) -> None:
    flights = read_flights(dumps)
    del flights[1]
    lag = find_lag(flights, 2)
    assert lag
    assert lag.late == [1]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_not_run(tmp_path: Path, dumps: Path) -> None:
    bait = tmp_path / "bait"
    content = pickle.loads((dumps / "rank_0").read_bytes())
    folder = tmp_path / "dumps"
    folder.mkdir()
    (folder / "rank_0").write_bytes(pickle.dumps({**content, "more": Evil(bait)}))
    (folder / "rank_1").write_bytes((dumps / "rank_0").read_bytes())
    assert list(read_flights(folder)) == [1]
    assert not bait.exists()
    pickle.loads((folder / "rank_0").read_bytes())  # the bait is one
    assert bait.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"{" * 50_000,
        b'{"entries": 3}',
        b'{"pg_status": {"0": 1}}',
        b'{"pg_status": {"0": {"last_enqueued_collective": null}}}',
        pickle.dumps([1, 2]),
    ],
)
def test_damaged_dump_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank_0").write_bytes(content)
    assert find_lag(read_flights(tmp_path), 2) is None


def test_what_is_too_large_or_no_dump_is_left_out(tmp_path: Path) -> None:
    with open(tmp_path / "rank_0", "wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    (tmp_path / "rank_1").mkdir()
    (tmp_path / "notes.txt").write_text("{}")
    assert read_flights(tmp_path) == {}
    assert read_flights(tmp_path / "absent") == {}


# --- which rank held up the others ----------------------------------------------------------------


def dump(groups: dict[str, tuple[list[int], int, int]], name: str = "all_reduce") -> bytes:
    """As NCCL's recorder writes it: of each group its ranks, the last begun, the last ended."""
    numbers = {group: str(i) for i, group in enumerate(groups)}
    entries = [
        {
            "pg_id": int(numbers[group]),
            "process_group": [group, "default_pg" if group == "0" else f"group {group}"],
            "collective_seq_id": number,
            "profiling_name": f"nccl:{name if number == begun else 'all_reduce'}",
            "input_sizes": [[2]],
            "is_p2p": False,
            "frames": [
                {"name": "sum", "filename": "/x/torch/distributed.py", "line": 1},
                {"name": "save", "filename": "/x/vectorlm/checkpoint.py", "line": 203},
            ],
        }
        for group, (_, begun, _) in groups.items()
        for number in range(1, begun + 1)
    ]
    return json.dumps(
        {
            "version": "2.10",
            "entries": entries,
            "pg_config": {g: {"ranks": str(ranks)} for g, (ranks, _, _) in groups.items()},
            "pg_status": {
                numbers[group]: {
                    "last_enqueued_collective": begun,
                    "last_started_collective": begun,
                    "last_completed_collective": ended,
                }
                for group, (_, begun, ended) in groups.items()
            },
        }
    ).encode()


def lag_of(folder: Path, *dumps: bytes) -> Lag | None:
    for rank, content in enumerate(dumps):
        (folder / f"rank_{rank}").write_bytes(content)
    return find_lag(read_flights(folder), len(dumps))


EVERYBODY = [0, 1, 2, 3]


def test_rank_that_holds_up_all_is_found_behind_those_that_wait_for_it(tmp_path: Path) -> None:
    """Hybrid sharding: rank 2 waits for rank 3, rank 0 for rank 2, and rank 1 for rank 3."""
    lag = lag_of(
        tmp_path,
        dump({"0": (EVERYBODY, 4, 4), "1": ([0, 1], 7, 7), "3": ([0, 2], 6, 5)}),
        dump({"0": (EVERYBODY, 4, 4), "1": ([0, 1], 7, 7), "4": ([1, 3], 6, 5)}),
        dump({"0": (EVERYBODY, 4, 4), "2": ([2, 3], 7, 6), "3": ([0, 2], 5, 5)}),
        dump({"0": (EVERYBODY, 4, 4), "2": ([2, 3], 6, 6), "4": ([1, 3], 5, 5)}),
    )
    assert lag
    assert lag.late == [3]
    assert lag.operation.place == "save in vectorlm/checkpoint.py:203"


def test_ranks_that_ask_for_different_things(tmp_path: Path) -> None:
    same = dump({"0": (EVERYBODY, 4, 3)})
    lag = lag_of(tmp_path, same, same, dump({"0": (EVERYBODY, 4, 3)}, "broadcast"), same)
    assert lag
    assert lag.late == []
    assert {rank: op.name for rank, op in lag.differing.items()} == {2: "broadcast"}
    assert lag.operation.name == "all_reduce"


def test_nobody_is_late_where_all_wait_for_the_same(tmp_path: Path) -> None:
    lag = lag_of(tmp_path, *[dump({"0": (EVERYBODY, 4, 3)})] * 4)
    assert lag
    assert (lag.late, lag.differing, lag.waiting) == ([], {}, EVERYBODY)


def test_no_lag_where_nothing_waits(tmp_path: Path) -> None:
    assert lag_of(tmp_path, *[dump({"0": (EVERYBODY, 4, 4)})] * 4) is None
    assert find_lag({0: Flight(0, {})}, None) is None
