"""The scripts in examples/ as a user submits them: the demo's model, trained, exported, loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.ranks import ROOT
from tests.slurm.conftest import LabMaker
from tests.slurm.lab import Lab
from vectorlm.demo import DEFAULT_DIR, prepare_assets

LIMIT_S = 300
DOCUMENTS = 200


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's files, from which its relative paths start; a few rows are enough
    here.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "configs"):
        (folder / name).symlink_to(ROOT / name)
    place = folder / DEFAULT_DIR
    place.mkdir(parents=True)
    prepare_assets(place)
    for corpus in (place / "data").glob("*.jsonl"):
        lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
        corpus.write_text("".join(lines[:DOCUMENTS]), encoding="utf-8")
    prepare = [sys.executable, ROOT / "preprocess_data.py", "--config", "configs/demo.yaml"]
    subprocess.run(prepare, cwd=folder, check=True, timeout=LIMIT_S)
    return folder


@pytest.fixture(scope="module")
def lab(slurm_lab: LabMaker) -> Lab:
    """Nodes with as many CPUs as the scripts ask for."""
    return slurm_lab(cpus=32)


def train_and_load(lab: Lab, checkout: Path, config: str, *sbatch: str) -> str:
    from transformers import AutoModelForCausalLM

    job = lab.sbatch(*sbatch, config, cwd=checkout)
    assert lab.wait(job, limit_s=LIMIT_S) == "COMPLETED", lab.account(job)
    convert = ["python", "-m", "vectorlm.utils.convert_to_hf", "--config", config]
    lab.run(*convert, cwd=checkout, limit_s=LIMIT_S)
    output = yaml.safe_load((checkout / config).read_text())["train_parameters"]["output_dir"]
    model = AutoModelForCausalLM.from_pretrained(checkout / output / "hf-model")
    assert model.num_parameters() > 700_000
    assert (checkout / f"vectorlm-{job}.log").exists()
    return lab.log(job)


@pytest.mark.slow
def test_one_node(lab: Lab, checkout: Path) -> None:
    log = train_and_load(lab, checkout, "configs/demo.yaml", "examples/launch.sh")
    assert "4 ranks on CPU: FULL_SHARD" in log
    assert "warning: the job holds 4 GPUs a node and computes on the CPU" in log


@pytest.mark.slow
def test_two_nodes(lab: Lab, checkout: Path) -> None:
    content = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    content["train_parameters"] |= {"sharding_strategy": "HYBRID_SHARD", "output_dir": "two"}
    (checkout / "two.yaml").write_text(yaml.safe_dump(content))
    two_each = ("--ntasks-per-node=2", "--gres=gpu:2")
    log = train_and_load(lab, checkout, "two.yaml", *two_each, "examples/launch_multinode.sh")
    assert "preflight of 2 nodes, 4 ranks" in log
    assert "4 ranks on CPU: HYBRID_SHARD" in log
