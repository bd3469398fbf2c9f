"""The preflight on real ranks. One machine plays two nodes: each rank is told which it is on."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import ROOT, run_ranks
from vectorlm.config.schema import Config
from vectorlm.distributed import Ranks
from vectorlm.errors import ClusterError
from vectorlm.preflight import SOFTWARE, Link, PreflightReport

LIMIT_S = 30.0


def config(model: Path | str, output: Path, **train: Any) -> Config:
    settings = {"output_dir": str(output), "max_seq_len": 48, **train}
    return Config.model_validate({"model": str(model), "train_parameters": settings})


# --- what the ranks do -----------------------------------------------------------------


def looked_at(ranks: Ranks, made: dict[str, Any]) -> dict[str, Any]:
    from vectorlm.measure import preflight

    began = time.monotonic()
    report = preflight(Config.model_validate(made), ranks, node(ranks))
    return {"reports": ranks.gather(report), "seconds": time.monotonic() - began}


def node(ranks: Ranks) -> str:
    return "ab"[ranks.rank // 2]


def stumbled(ranks: Ranks, made: dict[str, dict[str, Any]]) -> dict[str, list[str | None]]:
    """One mishap after the other, in shorter time than users are given."""
    from vectorlm import machine, measure

    measure.ANSWER_S, machine.FOLDER_S, measure.MOST_BYTES = 3.0, 3.0, {"cpu": 1 << 20}
    here = {name: Config.model_validate(one) for name, one in made.items()}
    apart = here["other" if ranks.rank > 1 else "one"]
    said = {
        "apart": raised(lambda: measure.preflight(apart, ranks, node(ranks))),
        "blocked": raised(lambda: measure.preflight(here["blocked"], ranks, node(ranks))),
    }
    all_reduces, measure.HANG_S = measure._all_reduces, 5.0
    if ranks.rank == 1:  # does not take part
        measure._all_reduces = lambda timer, members, most: time.sleep(60)  # type: ignore[assignment]
    said["hung"] = raised(lambda: measure.preflight(here["one"], ranks, node(ranks)))
    measure._all_reduces = all_reduces
    busy = ranks.rank == 3  # elsewhere, as a rank that hangs in a file system
    said["busy"] = (
        None if busy else raised(lambda: measure.preflight(here["one"], ranks, node(ranks)))
    )
    ranks.barrier()
    return {name: ranks.gather(text) for name, text in said.items()}


def raised(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except ClusterError as error:
        return str(error)
    return None


# --- what comes of it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("preflight") / "new/output"
    result = run_ranks(4, looked_at, config(model_folder("llama"), output).model_dump())
    return {**result, "output": output}


def test_every_rank_says_what_it_has(seen: dict[str, Any]) -> None:
    report: PreflightReport = seen["reports"][0]
    assert [(fact.rank, fact.node) for fact in report.facts] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    for fact in report.facts:
        assert fact.device == "CPU"
        assert (
            {"torch", "python", "transformers", "vectorlm"} <= fact.versions.keys() <= {*SOFTWARE}
        )
        assert set(fact.cores) == os.sched_getaffinity(0)
        assert fact.host_free_bytes > 0
        assert (fact.network.interface, fact.network.address) == ("lo", "127.0.0.1")
        assert abs(fact.clock_ahead_s) < 5
    firsts = [report.facts[0], report.facts[2]]
    for place in [f for first in firsts for f in (first.shm, first.tmp, first.output)]:
        assert place.problem is None
        assert place.free_bytes is not None
    assert report.facts[2].output.shared is True


def test_links_are_measured(seen: dict[str, Any]) -> None:
    links = seen["reports"][0].links
    assert list(links.inside) == ["a", "b"]
    measured: list[Link] = [*links.inside.values(), links.across, links.everywhere]
    assert [link.ranks for link in measured] == [2, 2, 2, 4]
    for link in measured:
        assert link.payload_bytes >= 1 << 20
        assert 1e6 < link.bus_bytes_s < 1e12
        assert 0 < link.latency_s < 1


def test_all_ranks_come_to_the_same(seen: dict[str, Any]) -> None:
    first, *others = [dataclasses.replace(report, seconds=0.0) for report in seen["reports"]]
    assert others == [first] * 3
    assert first.errors == ()
    assert first.advice.startswith("either suits: a step spends about ")


def test_it_is_over_in_time_and_leaves_only_the_report(seen: dict[str, Any]) -> None:
    assert seen["reports"][0].seconds <= seen["seconds"] < LIMIT_S
    report = seen["output"] / "preflight.json"
    assert [path.name for path in seen["output"].iterdir()] == [report.name]
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    written = json.loads(report.read_text())
    assert [fact["node"] for fact in written["facts"]] == ["a", "a", "b", "b"]
    assert written["links"]["across"]["ranks"] == 2


@pytest.fixture(scope="module")
def mishaps(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mishaps")
    (folder / "other").mkdir()
    (folder / "file").touch()
    outputs = {"one": folder / "one", "other": folder / "other", "blocked": folder / "file/output"}
    model = model_folder("llama")
    made = {name: config(model, path).model_dump() for name, path in outputs.items()}
    return {**run_ranks(4, stumbled, made), "folder": folder}


def test_folder_that_only_one_node_has(mishaps: dict[str, Any]) -> None:
    (said,) = set(mishaps["apart"])
    other = mishaps["folder"] / "other"
    assert said.startswith(f"preflight: b: train_parameters.output_dir {other} is not the folder")
    assert "\n" not in said


def test_folder_that_cannot_be_made(mishaps: dict[str, Any]) -> None:
    """With the reason, not with what follows from it."""
    (said,) = set(mishaps["blocked"])
    assert said.startswith("preflight: a: train_parameters.output_dir ")
    assert "output cannot be written (Not a directory)" in said
    assert "\n" not in said


def test_rank_that_does_not_answer(mishaps: dict[str, Any]) -> None:
    *said, busy = mishaps["busy"]
    assert busy is None
    assert len(set(said)) == 1
    assert "rank 3 of 4 did not answer within 3 s, while those on a, b wait" in said[0]


def test_all_reduce_that_does_not_end(mishaps: dict[str, Any]) -> None:
    (said,) = set(mishaps["hung"])
    assert said.startswith("preflight: the all-reduce inside a does not end; look at the")
    assert "\n" not in said


def test_nobody_waits_long_for_an_answer() -> None:
    from vectorlm.measure import ANSWER_S, BUDGET_S

    assert ANSWER_S <= 20
    assert BUDGET_S < LIMIT_S


# --- the door --------------------------------------------------------------------------


def door(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "vectorlm.cli", "preflight"]
    command += ["--config", str(path), *(f"--set={override}" for override in overrides)]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_alone_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    settings = {"output_dir": str(tmp_path / "output"), "max_seq_len": 48}
    path.write_text(yaml.safe_dump({"model": "no/such/model", "train_parameters": settings}))
    done = door(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("preflight of 1 node, 1 rank: torch ")
    assert "this was this machine alone" in done.stdout
    assert (tmp_path / "output/preflight.json").is_file()

    broken = door(path, "train_parameters.output_dir=/proc/no/output")
    assert broken.returncode == 2
    assert broken.stderr.count("train_parameters.output_dir /proc/no/output cannot be written") == 1
    assert "Traceback" not in broken.stderr
    assert door(path, "train_parameters.epochs=0").returncode == 2
