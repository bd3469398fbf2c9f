"""What would be fetched, and where to; how a job logs without a network."""

from __future__ import annotations

import pytest

from tests.check.project import Project, says
from vectorlm.check import downloads
from vectorlm.check.downloads import look


def test_nothing_to_fetch(project: Project) -> None:
    project.slurm()
    assert project.find(look) == []


def test_wandb_logs_offline(project: Project) -> None:
    project.config["enable_wandb_logging"] = True
    assert project.find(look) == [], "only jobs are offline"
    project.slurm()
    assert says(project.one(look, "note"), "log offline", "wandb sync")


def test_wandb_online_takes_a_key(project: Project) -> None:
    project.config.update(enable_wandb_logging=True, wandb_config={"mode": "online"})
    project.slurm()
    assert says(project.one(look, "warning"), "wandb_config.mode: is online.* no key", "login")
    netrc = project.folder / "home/.netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    netrc.chmod(0o600)
    assert project.find(look) == []
    netrc.unlink()
    project.environ["WANDB_API_KEY"] = "x"
    assert project.find(look) == []


def test_a_small_place_for_what_is_to_be_fetched(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.config["model"] = "some/model"
    monkeypatch.setattr(downloads, "SMALL_BYTES", 1 << 60)
    assert says(project.one(look, "warning"), "HF_HOME: .* in your home, where", "set HF_HOME")
    project.environ["HF_HOME"] = str(project.folder / "scratch")
    assert "in your home" not in project.one(look, "warning").text
    monkeypatch.setattr(downloads, "SMALL_BYTES", 0)
    assert project.find(look) == []
    monkeypatch.setattr(downloads, "SMALL_BYTES", 1 << 60)
    project.environ.pop("HF_HOME")
    project.config["model"] = str(project.model)
    project.cached("some/model")
    assert project.find(look) == [], "it is fetched"
