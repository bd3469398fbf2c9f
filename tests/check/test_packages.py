"""What is not installed, or not for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project, says
from vectorlm.check import libraries
from vectorlm.check.packages import look

CPU: dict[str, Any] = {"__version__": "2.13.0+cpu", "cuda": None, "hip": None}
CUDA: dict[str, Any] = {"__version__": "2.13.0", "cuda": "12.9", "hip": None}


@pytest.fixture(autouse=True)
def _build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "torch_build", lambda: CUDA)


WITHOUT = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == sys.argv[1] else real(name, *rest)
from tests.check.project import Project
from vectorlm.check.packages import look
from vectorlm.check.finding import Surroundings
from vectorlm.config.load import load_config
for found in look(Surroundings(load_config(sys.argv[2]), sys.argv[2])):
    print(found.severity, found.where, found.text, found.cure)
"""

NEEDS: dict[str, dict[str, Any]] = {
    "wandb": {"enable_wandb_logging": True},
    "tensorboard": {"enable_tensorboard_logging": True},
    "peft": {"train_parameters": {"lora_peft_config": {"r": 4}}},
    "submitit": {"slurm": {"gpus_per_node": 0, "launcher": "submitit"}},
}


@pytest.mark.parametrize("package", NEEDS)
def test_a_package_that_is_not_installed(package: str, project: Project) -> None:
    for key, value in NEEDS[package].items():
        if key == "train_parameters":
            project.train.update(value)
        else:
            project.config[key] = value
    assert project.find(look) == []
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, str(project.write())],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{package} is not installed" in done.stdout
    assert done.stdout.startswith("error ")
    assert "pip install" in done.stdout


def test_a_torch_without_gpus(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "torch_build", lambda: CPU)
    assert project.find(look) == []
    project.slurm(gpus_per_node=1)
    assert says(project.one(look, "warning"), "2.13.0\\+cpu is built without CUDA", "build for")


@pytest.mark.parametrize(
    "keys", [{"setup": ["source /opt/env/bin/activate"]}, {"container_image": "/x.sif"}], ids=str
)
def test_of_another_environment_nothing_is_sure(
    keys: dict[str, Any], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "torch_build", lambda: CPU)
    project.slurm(gpus_per_node=1, **keys)
    assert says(project.one(look, "note"), "another one than this", "in that environment")
    monkeypatch.setattr(libraries, "package_folder", lambda name: None)
    project.config["enable_wandb_logging"] = True
    severities = {finding.severity for finding in project.find(look)}
    assert severities == {"note", "warning"}


@pytest.mark.parametrize("kind", ["v100", "tesla_v100-sxm2-32gb", "t4", "p100", "rtx_2080ti"])
def test_gpus_without_bf16(kind: str, project: Project) -> None:
    project.slurm(gpus_per_node=1, gpu_type=kind)
    assert project.find(look) == []
    project.train["use_mp"] = True
    assert says(project.one(look), f"use_mp: bf16-mixed: {kind} has no bf16", "16-mixed")


@pytest.mark.parametrize("kind", ["a100", "h100", "rtx_a6000", "l40s", "l4", "gh200", "rtx_4090"])
def test_gpus_with_bf16(kind: str, project: Project) -> None:
    project.slurm(gpus_per_node=1, gpu_type=kind)
    project.train["precision"] = "bf16-true"
    assert project.find(look) == []


def test_versions_that_vectorlm_is_not_made_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = libraries.version
    monkeypatch.setattr(libraries, "version", lambda n: "2.4.1" if n == "torch" else real(n))
    assert says(project.one(look, "warning"), "torch: 2.4.1 is installed", "pip install 'torch")
    monkeypatch.setattr(libraries, "version", lambda n: "3.0" if n == "torch" else real(n))
    assert project.one(look, "warning")


def test_keys_without_effect(project: Project) -> None:
    project.train["reduce_dtype"] = "compute"
    assert says(project.one(look, "note"), "reduce_dtype: .*changes nothing", "leave it out")
    project.train["precision"] = "bf16-true"
    assert project.find(look) == []
    project.train["use_liger_kernel"] = True
    assert project.find(look) == []
    project.slurm()
    assert says(project.one(look, "note"), "use_liger_kernel: .*gpus_per_node is 0", "ask for")
    project.slurm(gpus_per_node=1)
    assert project.find(look) == []
