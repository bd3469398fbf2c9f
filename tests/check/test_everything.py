"""All looks at once: order, sweeps, and places that never answer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from tests.check.project import Project, says
from vectorlm.check import everything, libraries
from vectorlm.check.everything import NEEDS, TOPICS, findings, findings_beside
from vectorlm.check.finding import Finding, Surroundings
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, Section


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
    override = "train_parameters.max_seq_len=16"
    assert says(found(project, override)[0], "16", f"prepare.* --set {override}$")


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


# --- beside mistakes in the file ------------------------------------------------------------------


def beside(project: Project, *overrides: str) -> list[Finding]:
    return findings_beside(str(project.write()), project.environ, overrides)


def left_out(listed: list[Finding]) -> str:
    """What the last finding says was not looked at."""
    return listed[-1].text.partition("wrong: ")[2] if listed else ""


def test_a_mistake_in_the_file_does_not_hide_the_rest(project: Project) -> None:
    (project.model / "model.safetensors").unlink()
    project.slurm(setup=["source /away/activate"])
    project.train["logging_stepz"] = 3
    listed = beside(project)
    assert [finding.severity for finding in listed] == ["error", "warning", "note", "note"]
    assert says(listed[0], "model.* no weights", "copy|download")
    assert says(listed[1], "slurm.setup: /away/activate", "mend")
    assert left_out(listed) == "the output folder, the fit"


def test_nothing_is_told_of_what_rests_on_a_wrong_key(project: Project) -> None:
    """Nor from stand-ins for keys that are missing."""
    project.config["dataset"]["train_ds"] = "nowhere"
    project.train["optimizer"] = {"name": "Adamw"}
    del project.config["model"]
    listed = beside(project)
    assert [finding.where for finding in listed[:-1]] == ["train_parameters.optimizer.name"]
    assert left_out(listed).startswith("the model, LoRA, the data, the output folder, ")
    project.config["model"] = str(project.model)
    project.train["max_seq_len"] = "long"
    listed = beside(project)
    assert len(listed) == 2
    assert "the data" in left_out(listed)


def test_both_keys_of_a_contradiction_are_in_doubt(project: Project) -> None:
    project.config["dataset_preprocess"] = {
        "load_path": str(project.raw),
        "save_path": str(project.data),
        "packing_type": "partial",
        "overlap": 9,
    }
    # Of overlap and max_seq_len the first is named; it is the other that the model is held against.
    assert left_out(beside(project)).startswith("the model, the data, ")


def test_of_a_wrong_job_the_data_is_looked_at(project: Project) -> None:
    project.slurm(nodes="two", processes_per_node=80)
    project.config["dataset"]["train_ds"] = "nowhere"
    listed = beside(project)
    assert listed[0].where == "dataset.train_ds"
    assert "Slurm" in left_out(listed)
    assert "the data" not in left_out(listed)


def test_what_the_runs_of_a_sweep_differ_in_is_in_doubt(project: Project) -> None:
    project.slurm()
    project.config["dataset"]["train_ds"] = "each-its-own"
    grid = {"dataset.train_ds": [str(project.data)], "train_parameters.seed": [1, 1]}
    project.config["sweep"] = {"metric": "loss", "grid": grid}
    listed = beside(project)
    assert {finding.severity for finding in listed} <= {"note"}
    assert "the data" in left_out(listed)


def test_an_override_counts_and_a_file_that_is_no_yaml_says_nothing(project: Project) -> None:
    project.train["epochs"] = 0
    assert says(
        beside(project, f"model={project.folder / 'away'}")[0], "model: .*away", "folder of a model"
    )
    project.path.write_text("model: [\n")
    assert findings_beside(str(project.path), project.environ) == []
    assert findings_beside(str(project.folder / "absent.yaml"), project.environ) == []


@pytest.mark.parametrize("topic", TOPICS)
def test_topics_read_no_other_keys_than_they_say(
    topic: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stand-in for a wrong key might be taken for what the user wants."""
    raw = str(project.raw)
    prepare = {"load_path": raw, "save_path": str(project.folder / "new"), "packing_type": "full"}
    job = {"gpus_per_node": 2, "gpu_type": "a100", "mem": "9G"}
    variants: list[dict[str, Any]] = [
        {},
        {"slurm": job, "enable_wandb_logging": True},
        {"slurm": {**job, "time": "00:05:00"}, "dataset_preprocess": prepare},
        {"slurm": job, "model": "some/model", "wandb_config": {"mode": "online"}},
    ]
    read: set[str] = set()
    record_reads(read, monkeypatch)
    for number, variant in enumerate(variants):
        project.config.update(variant)
        project.train["lora_peft_config"] = {"r": 4} if number else None
        read_before = set(read)
        here = project.here()
        read &= read_before  # what loading reads
        list(TOPICS[topic](here))
    needs = NEEDS[topic].split()
    silent = ["slurm", "sweep"]  # taken out where they are wrong, and then nothing is said of them
    allowed = tuple(f"{key}." for key in [*needs, *silent])
    assert [key for key in read if not f"{key}.".startswith(allowed)] == []
    assert read or topic in ("secrets", "slurm")  # there is no Slurm to ask


def record_reads(read: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note each key of a configuration that is read, as far as it is no section."""
    prefixes = {
        type_of(field.annotation): f"{name}." for name, field in Config.model_fields.items()
    }
    prefixes = {kind: prefix for kind, prefix in prefixes.items() if kind} | {Config: ""}
    plain = object.__getattribute__

    def reading(self: Section, name: str) -> Any:
        kind = type(self)
        if kind in prefixes and name in kind.model_fields:
            if not type_of(kind.model_fields[name].annotation):
                read.add(prefixes[kind] + name)
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", reading, raising=False)


def type_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    kinds = [annotation, *get_args(annotation)]
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return found[0] if found else None
