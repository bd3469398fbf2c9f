"""Output folders that cannot be written, are too small, or belong to something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project, program, running_as_root, says
from vectorlm.check import output_folder
from vectorlm.check.output_folder import look
from vectorlm.cluster.claim import LOCK, OWNER
from vectorlm.config.load import config_to_dict, load_config
from vectorlm.manifest import read_manifest


def test_a_folder_to_come(project: Project) -> None:
    assert project.find(look) == []
    assert not project.output.exists()


def test_a_file_in_its_place(project: Project) -> None:
    project.output.write_text("notes")
    assert says(project.one(look), "output_dir: .* is a file", "another")
    project.train["output_dir"] = str(project.output / "below")
    assert says(project.one(look), "output_dir: .* is a file", "another")


def test_a_link_that_leads_nowhere(project: Project) -> None:
    project.output.symlink_to(project.folder / "gone")
    assert says(project.one(look), "leads nowhere", "another")


@pytest.mark.skipif(running_as_root(), reason="root may write everywhere")
def test_a_folder_of_others(project: Project) -> None:
    project.output.mkdir(mode=0o500)
    assert says(project.one(look), "is not yours", "another")


def test_a_folder_of_one_node_for_several(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "NODE_LOCAL", (str(project.folder),))
    project.slurm(nodes=1)
    assert project.find(look) == []
    project.slurm(nodes=2)
    assert says(project.one(look, "warning"), "of this node alone, .* has 2", "all nodes share")


# --- room -----------------------------------------------------------------------------------------


def test_too_little_room(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real numbers of a real file system, only the model is made larger."""
    project.edit("config.json", hidden_size=1 << 20, intermediate_size=1 << 22)
    assert says(project.one(look), "final model take about [\\d,.]+ GiB, .* are free", "make room")
    project.train["lora_peft_config"] = {"r": 1, "target_modules": ["q_proj"]}
    assert project.find(look) == [], "adapters are small"


def test_a_quota(project: Project) -> None:
    """1000 KiB and no file left."""
    from vectorlm.check.places import mount_of

    mount = mount_of(project.output)
    assert mount
    said = f"Filesystem blocks quota limit grace files\n{mount.device} 500 0 510 0 7 0 7 0"
    program(project.folder / "bin", "quota", said, code=1)
    project.environ["PATH"] = f"{project.folder / 'bin'}:/usr/bin:/bin"
    texts = [finding.text for finding in project.find(look)]
    assert any("10.0 KiB" in text or "0.0 MiB are left of your quota" in text for text in texts)
    assert any("0 files (inodes) are left of your quota" in text for text in texts)


# --- who has it -----------------------------------------------------------------------------------


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_is_writing(project: Project) -> None:
    import socket

    project.output.mkdir()
    owner = {"id": "x", "host": socket.gethostname(), "pid": 17, "job": None, "job_id": None}
    (project.output / OWNER).write_text(json.dumps(owner))
    assert project.find(look) == [], "its process is gone"
    command = [sys.executable, "-c", HOLD, str(project.output / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert says(project.one(look), "in use by a run on this machine \\(process 17\\)", "wait")
        (project.output / OWNER).write_text(json.dumps({**owner, "ended": 1.0}))
        assert project.find(look) == []


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint(project: Project, step: int = 3, **changes: Any) -> Path:
    """What a run of the project would have left, as far as it is looked at."""
    config = config_to_dict(load_config(project.write()))
    folder = project.output / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True)
    state = {
        "config": config,
        "precision": "32-true",
        "data": read_manifest(project.data).fingerprint(),
        "epoch": 0,
        "row": 24,
        "step": step,
        "global_batch": 1,
        "rank_batch": 1,
        "world": 1,
    }
    text = json.dumps({**state, **changes})
    (folder / "state.json").write_text(text)
    files = {"state.json": {"bytes": len(text), "sha256": ""}}
    (folder / "MANIFEST.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def test_a_run_that_goes_on(project: Project) -> None:
    checkpoint(project)
    assert says(project.one(look, "note"), "goes on from .*step_00000003", "begin anew")
    project.train["checkpointing_enabled"] = False
    assert project.find(look) == []


def test_checkpoints_of_another_run(project: Project) -> None:
    checkpoint(project)
    project.train["seed"] = 7
    found = project.one(look)
    assert says(found, "seed \\(was 42, is 7\\)", "resume_despite_changes: true")
    project.train["resume_despite_changes"] = True
    assert says(project.one(look, "note"), "seed", "resume_despite_changes")


def test_checkpoints_of_other_data(project: Project) -> None:
    checkpoint(project, data="0" * 64)
    assert says(project.one(look), "other settings: the training data", "another output_dir")


def test_checkpoints_of_another_batch(project: Project) -> None:
    checkpoint(project)
    project.config["dataset"]["train_bs"] = 2
    found = [finding for finding in project.find(look) if finding.severity == "error"]
    assert len(found) == 1
    assert says(found[0], "1 rows a step \\(1 on each of 1 ranks\\), .* says 2", "put train_bs")
    project.slurm(processes_per_node=4)
    project.config["dataset"]["train_bs"] = 1  # more ranks go on with the same batch
    assert [finding.severity for finding in project.find(look)] == ["note"]


def test_a_run_that_has_finished(project: Project) -> None:
    checkpoint(project, epoch=1)
    assert says(project.one(look, "warning"), "has finished .*1 of 1 epochs", "raise .*epochs")
    project.train["epochs"] = 2
    assert project.one(look, "note")


def test_a_damaged_checkpoint(project: Project) -> None:
    checkpoint(project, 3)
    newest = checkpoint(project, 6)
    (newest / "state.json").write_text("{")
    found = project.find(look)
    assert says(found[0], "step_00000006 is damaged: .* from step_00000003", "nothing")
    assert [finding.severity for finding in found] == ["warning", "note"]
    (project.output / "checkpoints/step_00000003/MANIFEST.json").write_text("{")
    assert says(project.one(look, "warning"), "none of the 2 checkpoints .* sound", "another")


@pytest.mark.skipif(not running_as_root(), reason="only root may give files away")
def test_checkpoints_of_another_user(project: Project) -> None:
    folder = checkpoint(project)
    os.chown(folder, 65534, 65534)
    found = [finding for finding in project.find(look) if finding.severity == "error"]
    assert says(found[0], "another user \\(65534\\)", "allow_foreign_checkpoints: true")
    project.train["allow_foreign_checkpoints"] = True
    assert project.one(look, "note")


def test_a_state_of_somebody_else(project: Project) -> None:
    folder = checkpoint(project)
    text = "{}".ljust((folder / "state.json").stat().st_size)
    (folder / "state.json").write_text(text)
    assert says(project.one(look, "warning"), "not what VectorLM writes", "another")
