"""The preflight on nodes of a real Slurm that have a network each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import ROOT
from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab

TWO_NODES = ("srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1")


@pytest.fixture
def lab(slurm_lab: LabMaker) -> Lab:
    return slurm_lab(networks=True)


@pytest.fixture
def config(tmp_path: Path, model_folder: Callable[..., Path]) -> Path:
    train = {
        "output_dir": str(tmp_path / "output"),
        "max_seq_len": 48,
        "gradient_accumulation_steps": 256,
    }
    slurm = {"gpus_per_node": 0, "processes_per_node": 2, "cpus_per_gpu": 1}
    sections = {"model": str(model_folder("llama")), "train_parameters": train, "slurm": slurm}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def door(lab: Lab, config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "vectorlm.preflight_door", "--config", config, *flags)
    return lab.run(*TWO_NODES, *command, limit_s=120, cwd=ROOT, check=False)


def test_every_node_is_looked_at(lab: Lab, config: Path, tmp_path: Path) -> None:
    done = door(lab, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("preflight of 2 nodes, 4 ranks: torch ")
    for node, ranks in (("n1", "0 and 1"), ("n2", "2 and 3")):
        (line,) = [text for text in done.stdout.splitlines() if text.startswith(f"  {node}: ")]
        assert f"rank {ranks} on CPU" in line
        assert ", eth0 10." in line
    report = json.loads((tmp_path / "output/preflight.json").read_text())
    assert sorted(report["links"]["inside"]) == ["n1", "n2"]
    assert report["links"]["everywhere"]["ranks"] == 4
    assert report["seconds"] < 30


def test_mistake_is_said_once_and_ends_all(lab: Lab, config: Path) -> None:
    done = door(lab, config, "--set=train_parameters.output_dir=/proc/no/output")
    assert done.returncode == 2
    said = "preflight: n1: train_parameters.output_dir /proc/no/output cannot be written"
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr


def test_slow_link_is_measured_and_told(lab: Lab, config: Path, tmp_path: Path) -> None:
    """Called in a batch script, as a user would: it starts its ranks on all nodes by itself."""
    lab.limit("200mbit")
    command = f"vectorlm preflight --config {config}"
    job = lab.sbatch("--nodes=2", "--ntasks-per-node=2", "--wrap", command, cwd=tmp_path)
    assert lab.wait(job, limit_s=120) == "COMPLETED", lab.log(job)
    report: dict[str, Any] = json.loads((tmp_path / "output/preflight.json").read_text())
    assert len(report["facts"]) == 4
    link = report["links"]["across"]
    bits = 8 * link["payload_bytes"] / link["seconds"]  # of two ranks each sends it all
    assert 0.2 * 200e6 < bits < 1.1 * 200e6
    log = lab.log(job)
    assert "warning: n1 and n2: the link between them carries 0.0" in log
    assert "warning: HYBRID_SHARD suits: a step spends about " in log
    assert "set train_parameters.sharding_strategy: HYBRID_SHARD" in log


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("sound", "all met"),
        ("loopback", "n1 cannot reach n2 at 127.0.0.1 (interface lo there, lo here): "),
        ("absent", "n2 has no network interface eth9"),
        ("missing", "rank 1 of 2 (no rank of n2 is there) did not answer within 2 s, while"),
    ],
)
def test_nodes_that_cannot_meet_are_named(lab: Lab, case: str, said: str) -> None:
    command = (sys.executable, "-m", "tests.slurm.meeting", case)
    done = lab.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, limit_s=120, cwd=ROOT)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    expected = [0] if case == "missing" else [0, 1]
    assert len(lines) == len(expected)
    for rank, line in zip(expected, lines, strict=True):
        assert line.startswith(f"rank {rank}: ")
        assert said in line
