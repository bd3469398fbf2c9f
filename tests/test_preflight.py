"""What the facts of a job mean: each finding is made when it should be, and only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vectorlm.preflight import (
    GIB,
    MIB,
    Finding,
    Folder,
    Link,
    Links,
    Needs,
    Network,
    PreflightReport,
    RankFacts,
    judge,
    names,
    size,
)

VERSIONS: dict[str, str | None] = {
    "torch": "2.13.0",
    "CUDA": "12.8",
    "NCCL": "2.27.3",
    "vectorlm": "0.1.0",
    "transformers": "5.23.0",
    "python": "3.11.7",
    "driver": "570.86.10",
}
A100 = "NVIDIA A100-SXM4-80GB"
Facts = list[RankFacts]


def network(name: str = "eth0", **changes: Any) -> Network:
    speeds: dict[str, int | None] = {"eth0": 25_000, "eth1": 1000}
    return Network(name, "10.0.0.1", speeds, **changes)


def rank(number: int, node: str) -> RankFacts:
    roomy = Folder("/tmp", 100 * GIB, 1_000_000)
    return RankFacts(
        rank=number,
        node=node,
        device=A100,
        versions=VERSIONS,
        cores=tuple(range(8 * (number % 2), 8 * (number % 2) + 8)),
        host_free_bytes=200 * GIB,
        network=network(),
        shm=Folder("/dev/shm", 60 * GIB),
        tmp=roomy,
        output=replace(roomy, path="/scratch/out"),
        gpu=f"{node}-{number}",
        gpu_free_bytes=79 * GIB,
        gpu_total_bytes=80 * GIB,
    )


def sound() -> Facts:
    """Two nodes of two ranks, and nothing wrong."""
    return [rank(0, "n1"), rank(1, "n1"), rank(2, "n2"), rank(3, "n2")]


NEEDS = Needs(cores=8, checkpoint_bytes=50 * GIB, host_bytes=4 * GIB, first_host_bytes=100 * GIB)
FAST = Link(4, 1 << 30, 0.1, 1e-4)
LINKS = Links({"n1": FAST, "n2": FAST}, FAST, FAST)


def on(node: str, **changes: Any) -> Callable[[], Facts]:
    return lambda: [replace(f, **changes) if f.node == node else f for f in sound()]


def on_rank(number: int, **changes: Any) -> Callable[[], Facts]:
    return lambda: [replace(f, **changes) if f.rank == number else f for f in sound()]


def with_version(name: str, value: str | None, node: str = "n2") -> Callable[[], Facts]:
    return on(node, versions={**VERSIONS, name: value})


def no_gpu(facts: Facts) -> Facts:
    return [
        replace(f, device="CPU", gpu=None, gpu_free_bytes=None, gpu_total_bytes=None) for f in facts
    ]


def folder(path: str = "/tmp", **changes: Any) -> Folder:
    return replace(Folder(path, 100 * GIB, 1_000_000), **changes)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert judge(sound(), LINKS, NEEDS) == []
    assert judge(no_gpu(sound()), LINKS, NEEDS) == []
    assert judge(sound()[:1], Links(), Needs()) == []


# name: (facts, level, nodes, part of the text)
FOUND: dict[str, tuple[Callable[[], Facts], str, tuple[str, ...], str]] = {
    "torch": (
        with_version("torch", "2.12.0"),
        "error",
        ("n1", "n2"),
        "torch is not the same: 2.13.0 on n1, 2.12.0 on n2",
    ),
    "CUDA": (with_version("CUDA", "12.6"), "error", ("n1", "n2"), "12.6 on n2"),
    "NCCL": (with_version("NCCL", "2.26.2"), "error", ("n1", "n2"), "2.26.2 on n2"),
    "vectorlm": (with_version("vectorlm", "0.0.9"), "error", ("n1", "n2"), "0.0.9 on n2"),
    "transformers": (with_version("transformers", "5.0"), "error", ("n1", "n2"), "5.0 on n2"),
    "python": (with_version("python", "3.12.1"), "warning", ("n1", "n2"), "3.12.1 on n2"),
    "driver": (with_version("driver", None), "warning", ("n1", "n2"), "none on n2"),
    "one rank's torch": (
        on_rank(1, versions={**VERSIONS, "torch": "2.12.0"}),
        "error",
        ("n1", "n2"),
        "2.13.0 on n1 and n2, 2.12.0 on n1",
    ),
    "other GPU": (
        on("n2", device="Tesla V100-SXM2-32GB"),
        "warning",
        ("n1", "n2"),
        f"{A100} on n1, Tesla V100-SXM2-32GB on n2",
    ),
    "no GPU": (
        lambda: [*sound()[:2], *no_gpu(sound()[2:])],
        "error",
        ("n2",),
        "n2: rank 2 and 3 sees no GPU",
    ),
    "one GPU for two": (
        on("n2", gpu="same"),
        "error",
        ("n2",),
        "n2: ranks 2 and 3 are on the same GPU",
    ),
    "used GPU": (
        on_rank(3, gpu_free_bytes=70 * GIB),
        "warning",
        ("n2",),
        "n2: 10.0 GiB of the 80.0 GiB of rank 3's GPU are used",
    ),
    "GPU of another": (on_rank(3, gpu_free_bytes=30 * GIB), "error", ("n2",), "rank 3's GPU"),
    "shared memory": (
        on("n2", shm=Folder("/dev/shm", 127 * MIB)),
        "error",
        ("n2",),
        "n2: /dev/shm has 127 MiB free, NCCL needs about 128 MiB for 2 ranks",
    ),
    "broken TMPDIR": (
        on_rank(2, tmp=Folder("/local", problem="Read-only file system")),
        "error",
        ("n2",),
        "n2: TMPDIR /local cannot be used (Read-only file system)",
    ),
    "full TMPDIR": (
        on("n2", tmp=folder(free_bytes=255 * MIB)),
        "warning",
        ("n2",),
        "n2: TMPDIR /tmp is nearly full (255 MiB, 1,000,000 files left)",
    ),
    "no files in TMPDIR": (on("n2", tmp=folder(free_files=9)), "warning", ("n2",), "9 files left"),
    "output_dir not shared": (
        on_rank(2, output=folder("/out", shared=False)),
        "error",
        ("n2",),
        "n2: train_parameters.output_dir /out is not the folder that n1 has",
    ),
    "output_dir not there": (
        on_rank(2, output=Folder("/out", problem="No such file or directory", shared=False)),
        "error",
        ("n2",),
        "is not the folder that n1 has",
    ),
    "output_dir not writable": (
        on_rank(2, output=Folder("/out", problem="Disk quota exceeded", shared=True)),
        "error",
        ("n2",),
        "n2: train_parameters.output_dir /out cannot be written (Disk quota exceeded)",
    ),
    "output_dir full": (
        on("n1", output=folder("/out", free_bytes=255 * MIB)),
        "error",
        ("n1",),
        "n1: train_parameters.output_dir /out: the disk is full (255 MiB, 1,000,000 files left)",
    ),
    "output_dir without files": (
        on("n1", output=folder("/out", free_files=999)),
        "error",
        ("n1",),
        "999 files left",
    ),
    "output_dir small": (
        on("n1", output=folder("/out", free_bytes=49 * GIB)),
        "warning",
        ("n1",),
        "n1: train_parameters.output_dir /out has 49.0 GiB free, a checkpoint needs about 50.0 GiB",
    ),
    "cores": (
        on("n2", cores=tuple(range(8))),
        "warning",
        ("n2",),
        "n2: 4 cores for each rank, 8 were asked for",
    ),
    "host memory": (
        on("n2", host_free_bytes=3 * GIB),
        "warning",
        ("n2",),
        "n2: 3.0 GiB of host memory are free, loading the model needs about 4.0 GiB",
    ),
    "first host's memory": (
        on("n1", host_free_bytes=99 * GIB),
        "warning",
        ("n1",),
        "needs about 100 GiB",
    ),
    "clock ahead": (
        on("n2", clock_ahead_s=61.0),
        "warning",
        ("n2",),
        "n2: its clock is 61 s ahead of that of n1",
    ),
    "clock behind": (on("n2", clock_ahead_s=-3600.0), "warning", ("n2",), "3600 s behind"),
    "absent interface": (
        on("n2", network=network(absent="ib0")),
        "error",
        ("n2",),
        "n2: there is no network interface ib0 (it has eth0 and eth1)",
    ),
    "slow interface": (
        on("n2", network=network("eth1")),
        "warning",
        ("n2",),
        "n2: traffic between nodes goes over eth1 (1 Gb/s) although eth0 (25 Gb/s) is up",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    """One finding, with the nodes it names, and a cure behind the semicolon or the colon."""
    facts, level, nodes, text = FOUND[name]
    (finding,) = judge(facts(), LINKS, NEEDS)
    assert (finding.level, finding.nodes) == (level, nodes)
    assert text in finding.text
    assert all(node in finding.text for node in nodes)
    assert ";" in finding.text


SILENT: dict[str, Callable[[], Facts]] = {
    "what a process takes by starting": on("n2", gpu_free_bytes=78 * GIB),
    "enough shared memory": on("n2", shm=Folder("/dev/shm", 128 * MIB)),
    "little shared memory without GPUs": lambda: no_gpu(on("n2", shm=Folder("/dev/shm", 0))()),
    "files that are not counted": on("n2", tmp=folder(free_files=None)),
    "room for a checkpoint": on("n1", output=folder("/out", free_bytes=50 * GIB)),
    "a folder that the first rank's node sees": on("n2", output=folder("/out", shared=True)),
    "little room on another view": on("n2", output=folder("/out", free_bytes=GIB)),
    "a clock that is nearly right": on("n2", clock_ahead_s=60.0),
    "a slow interface beside InfiniBand": on("n2", network=network("eth1", infiniband=True)),
    "an interface of unknown speed": on("n2", network=replace(network(), interface="bond0")),
    "memory of the first node only": on("n2", host_free_bytes=4 * GIB),
}


@pytest.mark.parametrize("name", SILENT)
def test_not_found(name: str) -> None:
    assert judge(SILENT[name](), LINKS, NEEDS) == []


def test_gpus_wait_for_a_single_core() -> None:
    """Also where nobody has said how many cores there should be."""
    facts = on("n2", cores=(0, 1))()
    (finding,) = judge(facts, LINKS, Needs())
    assert "n2: 1 core for each rank, the CPU will hold the GPU up" in finding.text
    assert judge(no_gpu(facts), LINKS, Needs()) == []


def test_another_interface_than_the_one_asked_for() -> None:
    facts = on("n2", network=network("eth0"))()
    (finding,) = judge(facts, LINKS, replace(NEEDS, interface="ib0,ib1"))
    assert finding.nodes == ("n1", "n2")
    assert "traffic goes over eth0, but slurm.network_interface asks for ib0,ib1" in finding.text
    assert judge(facts, LINKS, replace(NEEDS, interface="ib0,eth")) == []
    assert judge(facts, LINKS, replace(NEEDS, interface="^lo")) == []


def test_slow_link() -> None:
    """By what was measured, whatever the interface says of itself."""
    slow = Link(2, 1 << 20, (1 << 20) / 0.1249e9, 1e-3)
    (finding,) = judge(sound(), replace(LINKS, across=slow), NEEDS)
    assert (finding.level, finding.nodes) == ("warning", ("n1", "n2"))
    assert "carries 0.125 GB/s, less than 1 Gb/s (interface eth0)" in finding.text
    fast_enough = replace(slow, seconds=(1 << 20) / 0.1251e9)
    assert judge(sound(), replace(LINKS, across=fast_enough), NEEDS) == []
    assert judge(sound()[:2], Links({"n1": slow}), NEEDS) == []  # there is no link


def test_node_that_lags() -> None:
    slow = replace(FAST, seconds=FAST.seconds * 2.1)
    (finding,) = judge(sound(), Links({"n1": FAST, "n2": slow, "n3": FAST}, FAST, FAST), NEEDS)
    assert finding.nodes == ("n2",)
    assert "n2: its GPUs reach 7.67 GB/s among themselves, those of the other" in finding.text
    usual = replace(FAST, seconds=FAST.seconds * 1.9)
    assert judge(sound(), Links({"n1": FAST, "n2": usual, "n3": FAST}, FAST, FAST), NEEDS) == []


def test_errors_stand_first() -> None:
    """Also where a warning was found before them."""
    facts = on("n2", gpu="same", versions={**VERSIONS, "driver": "550.54.14"})()
    assert [finding.level for finding in judge(facts, LINKS, NEEDS)] == ["error", "warning"]


# --- the report ------------------------------------------------------------------------


def report(*findings: Finding, advice: str = "FULL_SHARD suits") -> PreflightReport:
    return PreflightReport(tuple(sound()), LINKS, findings, advice, 4.25)


def test_report_has_a_line_for_each_node_and_link() -> None:
    lines = report(Finding("warning", ("n2",), "n2: slow")).text().splitlines()
    assert lines == [
        "preflight of 2 nodes, 4 ranks: torch 2.13.0, CUDA 12.8, NCCL 2.27.3, vectorlm 0.1.0, "
        "transformers 5.23.0, python 3.11.7, driver 570.86.10",
        "  n1: rank 0 and 1 on NVIDIA A100-SXM4-80GB, 79.0 GiB of 80.0 GiB free, 16 cores, "
        "200 GiB host memory free, /dev/shm 60.0 GiB, TMPDIR 100 GiB, output_dir 100 GiB, "
        "eth0 10.0.0.1",
        "  n2: rank 2 and 3 on NVIDIA A100-SXM4-80GB, 79.0 GiB of 80.0 GiB free, 16 cores, "
        "200 GiB host memory free, /dev/shm 60.0 GiB, TMPDIR 100 GiB, output_dir 100 GiB, "
        "eth0 10.0.0.1",
        "  inside each node (slowest: n1): all-reduce of 1.0 GiB by 4 ranks 0.1 s (10.7 GB/s, "
        "bus 16.1 GB/s), latency 0.1 ms",
        "  across nodes, one rank each: all-reduce of 1.0 GiB by 4 ranks 0.1 s (10.7 GB/s, "
        "bus 16.1 GB/s), latency 0.1 ms",
        "  all ranks: all-reduce of 1.0 GiB by 4 ranks 0.1 s (10.7 GB/s, bus 16.1 GB/s), "
        "latency 0.1 ms",
        "  warning: n2: slow",
        "  advice: FULL_SHARD suits",
        "  took 4.2 s",
    ]


def test_advice_that_warns_stands_once() -> None:
    text = report(Finding("warning", ("n1",), "take the other"), advice="take the other").text()
    assert text.count("take the other") == 1
    assert "advice" not in text


def test_errors_are_left_to_the_exception() -> None:
    made = report(Finding("error", ("n2",), "n2: broken"))
    assert [error.text for error in made.errors] == ["n2: broken"]
    assert "broken" not in made.text()
    assert made.to_dict()["findings"][0]["nodes"] == ("n2",)


def test_bandwidths() -> None:
    """Bus bandwidth is what a rank sends: each number twice, less its own share."""
    link = Link(ranks=4, payload_bytes=1000, seconds=0.5, latency_s=0.0)
    assert link.algorithm_bytes_s == 2000
    assert link.bus_bytes_s == 3000


def test_names_and_sizes() -> None:
    assert names([]) == ""
    assert names(["n1"]) == "n1"
    assert names([0, 1, 2]) == "0, 1 and 2"
    assert names(list(range(12))) == "0, 1, 2, 3, 4, 5, 6 and 5 more"
    assert [size(n) for n in (0, 1023 * MIB, GIB, 150 * GIB)] == [
        "0 MiB",
        "1023 MiB",
        "1.0 GiB",
        "150 GiB",
    ]
