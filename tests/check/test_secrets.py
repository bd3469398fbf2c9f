"""Secrets that others can read; what only looks like one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project, says
from vectorlm.check.secrets import look

# Put together here, so that no scanner takes this file for a leak.
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123456789"
HEX = "0123456789abcdef" * 2 + "01234567"
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.fixture
def project() -> Iterator[Project]:
    """In a folder that others can reach: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Project(Path(folder))


def test_nothing(project: Project) -> None:
    project.slurm(setup=["export HF_TOKEN=$(cat ~/.token)", "module load cuda/12.4"])
    project.config["wandb_config"] = {"notes": "the token count; password protected", "id": HEX}
    assert project.find(look) == []


SECRETS: list[tuple[dict[str, Any], str]] = [
    ({"wandb_config": {"notes": f"with {TOKEN}"}}, "wandb_config.notes: holds a Hugging Face"),
    ({"wandb_config": {"tags": ["a", AWS]}}, "wandb_config.tags: holds an AWS access key"),
    (
        {"slurm": {"gpus_per_node": 0, "extra_flags": [f"--export=ALL,WANDB_API_KEY={HEX}"]}},
        "slurm.extra_flags: holds a secret key",
    ),
    (
        {"wandb_config": {"settings": {"base_url": "https://me:hunter22@wandb.site.org"}}},
        "wandb_config.settings.base_url: holds a password in an address",
    ),
]


@pytest.mark.parametrize(("changes", "text"), SECRETS, ids=[text for _, text in SECRETS])
def test_a_secret(changes: dict[str, Any], text: str, project: Project) -> None:
    project.config.update(changes)
    found = project.one(look)
    assert says(found, text, "revoke")
    told = str(found)
    assert not any(secret in told for secret in (TOKEN, HEX, AWS, "hunter22"))


def test_a_secret_in_a_comment(project: Project) -> None:
    here = project.here()
    with project.path.open("a") as file:
        file.write(f"# export HF_TOKEN={TOKEN}\n")
    (found,) = look(here)
    assert says(found, r"config.yaml:\d+: holds a Hugging Face token", "hf auth login")


# --- files of the home ----------------------------------------------------------------------------


def opened(project: Project, name: str, mode: int) -> Path:
    """A file, with the folders of the project open to others."""
    path = project.folder / "home" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("machine x login y password z")
    path.chmod(mode)
    for folder in path.parents:
        if folder.is_relative_to(project.folder):
            folder.chmod(0o755)
    return path


@pytest.mark.parametrize("name", [".netrc", ".cache/huggingface/token", ".huggingface/token"])
def test_keys_that_others_can_read(name: str, project: Project) -> None:
    path = opened(project, name, 0o644)
    assert says(project.one(look, "warning"), f"{name}: .* read by others", f"chmod 600 {path}")
    path.chmod(0o640)
    assert says(project.one(look, "warning"), "read by your group", "chmod 600")
    path.chmod(0o600)
    assert project.find(look) == []
    path.chmod(0o644)
    (project.folder / "home").chmod(0o700)
    assert project.find(look) == [], "a closed home protects what is in it"


def test_a_configuration_that_everybody_can_change(project: Project) -> None:
    here = project.here()
    opened(project, "x", 0o600)
    project.path.chmod(0o666)
    (found,) = look(here)
    assert says(found, "config.yaml: can be changed by everybody", "chmod o-w")
