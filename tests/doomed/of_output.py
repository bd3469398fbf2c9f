"""Output folders that cannot be written, have no room, or belong to something else."""

from __future__ import annotations

import os
import shutil
import socket
import time

from tests.doomed.case import Case
from tests.doomed.entry import doomed

ANOTHER = r"output_dir|another folder"
NOBODY = 65534


@doomed(r"output_dir.*(file|folder)", ANOTHER, "cannot be written")
def a_file_in_place_of_the_output(case: Case) -> None:
    case.put(case.output, "notes")


@doomed(r"output_dir", ANOTHER, "cannot be written")
def an_output_below_a_file(case: Case) -> None:
    case.put(case.folder / "notes", "notes")
    case.train["output_dir"] = str(case.folder / "notes/output")


@doomed(
    r"output_dir.*(written|read-only|[Rr]ead.only|permission)",
    ANOTHER,
    "cannot be written",
    as_root=True,
)
def an_output_that_is_read_only(case: Case) -> None:
    case.mount = ("ro,size=64m", case.output)


@doomed(
    r"output_dir.*(free|full|room|space)",
    r"free|" + ANOTHER + r"|keep_checkpoints",
    "the checkpoint could not be saved: the disk is full or your quota is used up",
    as_root=True,
)
def too_little_room_for_the_checkpoints(case: Case) -> None:
    case.mount = ("size=700k", case.output)


@doomed(
    r"output_dir.*(inode|files)",
    r"inode|remove|" + ANOTHER,
    "No space left on device",
    as_root=True,
)
def no_inodes_left(case: Case) -> None:
    case.mount = ("size=64m,nr_inodes=4", case.output)


@doomed(
    r"output_dir.*in use|in use.*output_dir|output_dir.*(run|process)",
    r"wait|end it|another",
    "is in use by a run on this machine",
    severities=("error", "warning"),
)
def an_output_that_a_run_is_writing(case: Case) -> None:
    from vectorlm.cluster.claim import take
    from vectorlm.cluster.journal import StartRecord

    host, pid = socket.gethostname(), os.getpid()
    start = StartRecord(1, "other", time.time(), None, None, 0, host, pid)
    case.on_leave.append(take(case.output, start).release)


@doomed(
    r"output_dir.*(seed).*(was 42|7)|seed",
    r"another output_dir|resume_despite_changes",
    "its checkpoints were made with other settings",
)
def the_checkpoints_of_another_seed(case: Case) -> None:
    case.finished_run()
    case.train["seed"] = 7


@doomed(
    r"output_dir.*model",
    r"another output_dir|resume_despite_changes|put",
    "its checkpoints were made with other settings",
)
def the_checkpoints_of_another_model(case: Case) -> None:
    case.finished_run()
    shutil.copytree(case.model, case.folder / "copy", copy_function=os.link)
    case.config["model"] = str(case.folder / "copy")


@doomed(
    r"output_dir.*lora",
    r"another output_dir|resume_despite_changes|put",
    "its checkpoints were made with other settings",
)
def the_checkpoints_of_a_full_run_for_adapters(case: Case) -> None:
    case.finished_run()
    case.train["lora_peft_config"] = {"r": 4}


@doomed(
    r"output_dir.*(data)",
    r"another output_dir|resume_despite_changes|put",
    "its checkpoints were made with other settings",
)
def the_checkpoints_of_other_data(case: Case) -> None:
    case.finished_run()
    case.put(case.raw / "train.jsonl", '{"text": "A text that came later."}\n' * 40)
    case.prepare_again()


@doomed(
    r"(output_dir|train_bs).*(rows a step|batch)",
    r"train_bs|gradient_accumulation_steps|resume_despite_changes",
    "its checkpoint was made with 4 rows a step",
)
def the_checkpoints_of_another_batch(case: Case) -> None:
    case.finished_run()
    case.train["gradient_accumulation_steps"] = 1
    case.dataset["train_bs"] = 1


@doomed(
    r"(output_dir|checkpoints).*(another user|nobody|belong)",
    r"allow_foreign_checkpoints",
    "allow_foreign_checkpoints",
    as_root=True,
)
def the_checkpoints_of_another_user(case: Case) -> None:
    case.finished_run()
    checkpoints = case.output / "checkpoints"
    copied = case.folder / "copied"
    shutil.copytree(checkpoints, copied)
    shutil.rmtree(checkpoints)
    for folder, _, files in os.walk(copied):
        for name in ("", *files):
            os.chown(os.path.join(folder, name), NOBODY, NOBODY)
    copied.rename(checkpoints)


@doomed(
    r"output_dir.*(finished|final-model)",
    r"another output_dir|epochs|remove",
    "finished: .../output/final-model",
    severities=("error", "warning"),
)
def a_run_that_has_finished(case: Case) -> None:
    """Silent: days in the queue for a job that finds nothing to do."""
    case.finished_run()


@doomed(
    r"(output_dir|checkpoints).*(sound|damaged|broken|none)",
    r"remove|another output_dir|move",
    "skipped checkpoint step_00000006: MANIFEST.json cannot be read",
    severities=("error", "warning"),
)
def checkpoints_of_which_none_is_sound(case: Case) -> None:
    case.finished_run()
    for manifest in case.output.glob("checkpoints/*/MANIFEST.json"):
        case.put(manifest, "{")
