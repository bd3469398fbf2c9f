"""All looks at once: order, sweeps, and places that never answer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from tests.check.project import Project, says
from vectorlm.check import everything, libraries
from vectorlm.check.everything import findings
from vectorlm.check.finding import Finding, Surroundings
from vectorlm.config.load import load_config


def found(project: Project, *overrides: str) -> list[Finding]:
    config = load_config(project.write(), overrides)
    return findings(config, str(project.path), project.environ, overrides)


def test_sound(project: Project) -> None:
    assert found(project) == []


def test_all_at_once_the_worst_first(project: Project) -> None:
    project.train.update(optimizer={"name": "Adamw"}, seed=3)
    project.config.update(enable_wandb_logging=True, model=str(project.folder / "away"))
    project.slurm()
    listed = found(project)
    assert [finding.severity for finding in listed] == ["error", "error", "note"]
    assert {finding.where for finding in listed} == {
        "model",
        "train_parameters.optimizer.name",
        "enable_wandb_logging",
    }


def test_overrides_count(project: Project) -> None:
    assert says(found(project, "train_parameters.max_seq_len=16")[0], "16", "prepare")


def test_each_run_of_a_sweep_is_looked_at_and_equal_findings_told_once(project: Project) -> None:
    project.slurm()
    project.config["sweep"] = {
        "metric": "loss",
        "grid": {
            "train_parameters.optimizer.name": ["AdamW", "Adafactor"],
            "train_parameters.seed": [1, 2, 3],
        },
    }
    listed = [finding for finding in found(project) if finding.severity == "error"]
    assert len(listed) == 1
    assert says(listed[0], "Adafactor", "AdamW")


def test_a_sweep_looks_at_the_folders_of_its_runs(project: Project) -> None:
    project.slurm()
    project.config["sweep"] = {"metric": "loss", "grid": {"train_parameters.seed": [1, 2]}}
    project.output.mkdir()
    (project.output / "001").write_text("in the way")
    errors = [finding for finding in found(project) if finding.severity == "error"]
    assert len(errors) == 1
    assert says(errors[0], "out/001 is a file", "another")


def test_a_file_that_never_answers(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes into stands for a file system that is gone."""
    monkeypatch.setattr(everything, "LIMIT_S", 1.5)
    pipe = project.model / "config.json"
    pipe.unlink()
    os.mkfifo(pipe)
    project.train["optimizer"] = {"name": "Adamw"}
    try:
        begun = time.monotonic()
        listed = found(project)
        assert time.monotonic() - begun < 4
        assert any("Adamw" in finding.text for finding in listed), "the others are told"
        silent = [finding for finding in listed if "did not answer" in finding.text]
        assert says(silent[0], "model: the folder of the model did not answer", "try again")
    finally:
        _release(pipe)


def _release(pipe: os.PathLike[str]) -> None:
    """Let the waiting threads read an end of file, so that they end with the test."""
    deadline = time.monotonic() + 10
    own = threading.active_count()
    while own > 1 and time.monotonic() < deadline:
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return  # nobody reads any more
        time.sleep(0.05)


def test_a_fault_of_one_look_leaves_the_others(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(here: Surroundings) -> Iterator[Finding]:
        yield from ()
        raise KeyError("oops")

    monkeypatch.setitem(everything.TOPICS, "packages", faulty)
    project.train["max_seq_len"] = 16
    first, second = found(project)
    assert first.severity == "error"
    assert says(second, "packages: could not be looked at .*KeyError: 'oops'", "report")


def test_libraries_are_read_by_many_threads(project: Project) -> None:
    """Parsers of several threads once ended in a SystemError."""
    for _ in range(3):
        for name in ("_tree", "model_types", "causal_types", "optimizers", "lora_arguments"):
            getattr(libraries, name).cache_clear()
        project.train["lora_peft_config"] = {"r": 4}
        assert found(project) == []
