"""Can the run write where it is told to, and is that folder its own? Floor 1, called by
`everything`.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.check.places import IN_MEMORY, cannot_write, free, gib, mount_of
from vectorlm.check.quota import left
from vectorlm.cluster import slurm
from vectorlm.cluster.claim import LOCK, OWNER
from vectorlm.cluster.journal import read_json
from vectorlm.config.continuity import FIXED, among, changes
from vectorlm.errors import ClusterError, DataError
from vectorlm.manifest import read_manifest

KEY = "train_parameters.output_dir"
ANOTHER = "give another train_parameters.output_dir"
# Of one node: what is written there is not seen by the others, and may be gone with the job.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")
STATFS_S = 5.0
FEWEST_FILES = 50
_STEP = re.compile(r"step_(\d{8,})")
_LOCKS = Path("/proc/locks")


def look(here: Surroundings) -> Iterator[Finding]:
    folder = here.output_dir
    reason = cannot_write(folder)
    if reason:
        yield error(KEY, f"{folder} cannot be written ({reason})", ANOTHER)
        return
    yield from _kind_of_place(here, folder)
    yield from _room(here, folder)
    if folder.is_dir():
        yield from _in_use(folder)
        yield from _checkpoints(here, folder)


def _kind_of_place(here: Surroundings, folder: Path) -> Iterator[Finding]:
    real = folder.resolve()
    if here.model_folder and here.model_folder.resolve() in (real, *real.parents):
        text = f"{folder} lies in the model's own folder"
        yield warning(KEY, text, f"{ANOTHER}, so that the model stays as it is")
    slurm_section = here.config.slurm
    mount = mount_of(folder)
    if slurm_section is not None and slurm_section.nodes > 1:
        local = any(Path(place) in (real, *real.parents) for place in NODE_LOCAL)
        if local or (mount and mount.kind in IN_MEMORY):
            yield warning(
                KEY,
                f"{folder} is a folder of this node alone, and the job has {slurm_section.nodes}",
                "give one on a file system that all nodes share",
            )


# --- room -----------------------------------------------------------------------------------------


def _room(here: Surroundings, folder: Path) -> Iterator[Finding]:
    place = free(folder, STATFS_S)
    if place.problem:
        text = f"the file system of {folder} does not say how much room it has ({place.problem})"
        yield warning(KEY, text, "look at it: df; is it mounted, and does it answer?")
        return
    needed = needed_bytes(here, folder)
    rooms = [(place.free_bytes, place.free_files, "are free"), *left(folder, here.environ)]
    for free_bytes, free_files, what in rooms:
        if free_bytes is not None and free_bytes < needed:
            yield error(
                KEY,
                f"checkpoints and the final model take about {gib(needed)}, and in {folder} "
                f"{gib(free_bytes)} {what}",
                f"make room, lower train_parameters.keep_checkpoints, or {ANOTHER}",
            )
        elif free_bytes is not None and free_bytes < needed + _converted_bytes(here):
            yield warning(
                KEY,
                f"in {folder} {gib(free_bytes)} {what}: enough to train, but not for `vectorlm "
                f"convert` behind it, which takes {gib(_converted_bytes(here))} more",
                "make room until then, or convert to another place: vectorlm convert --out FOLDER",
            )
        if free_files is not None and free_files < FEWEST_FILES:
            yield error(
                KEY,
                f"in {folder} {free_files} files (inodes) {what}, and a run writes dozens",
                f"remove files, or {ANOTHER}",
            )


def needed_bytes(here: Surroundings, folder: Path) -> int:
    """What a run will yet write here, at the least; 0 where it cannot be told."""
    train, outlook = here.config.train_parameters, here.outlook
    if outlook is None:
        return 0
    saves = math.ceil(1 / train.save_frequency) * train.epochs
    # The new one is whole before an old one goes.
    most = min(saves, train.keep_checkpoints + 1) if train.checkpointing_enabled else 0
    there = sum(1 for _ in (folder / "checkpoints").glob("step_*"))
    return outlook.checkpoint_bytes * max(most - there, 0) + outlook.final_bytes // 2


def _converted_bytes(here: Surroundings) -> int:
    return here.outlook.final_bytes // 2 if here.outlook else 0


# --- who has it -----------------------------------------------------------------------------------


def _in_use(folder: Path) -> Iterator[Finding]:
    owner = read_json(folder / OWNER)
    if owner is None or owner.get("ended"):
        return
    job = owner.get("job_id")
    if isinstance(job, str) and _job_state(job) in slurm.ALIVE:
        who = f"job {owner.get('job') or job} on {owner.get('host')}"
    elif owner.get("host") == socket.gethostname() and _is_locked(folder / LOCK):
        who = f"a run on this machine (process {owner.get('pid')})"
    else:
        return
    yield error(KEY, f"{folder} is in use by {who}", f"wait for it, end it, or {ANOTHER}")


def _job_state(job: str) -> str | None:
    if not slurm.installed():
        return None
    try:
        return (slurm.show_job(job) or {}).get("JobState")
    except ClusterError:
        return None


def _is_locked(path: Path) -> bool:
    """By the kernel's list: to try for the lock could get in the way of a run that starts."""
    try:
        number = path.stat().st_ino
        lines = _LOCKS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any("FLOCK" in line and line.split()[5].endswith(f":{number}") for line in lines)


# --- what it holds --------------------------------------------------------------------------------


def _checkpoints(here: Surroundings, folder: Path) -> Iterator[Finding]:
    if not here.config.train_parameters.checkpointing_enabled:
        return
    root = folder / "checkpoints"
    steps = [path for path in root.glob("step_*") if _STEP.fullmatch(path.name)]
    if not steps:
        return
    newest_first = sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)
    yield from _foreign(here, newest_first[0])
    sound = [path for path in newest_first if _is_whole(path)]
    if not sound:
        text = f"none of the {len(steps)} checkpoints in {root} is sound: the run would begin anew"
        yield warning(KEY, text, f"move them away, or {ANOTHER}")
        return
    if sound[0] != newest_first[0]:
        text = f"{newest_first[0].name} is damaged: the run would go on from {sound[0].name}"
        yield warning(KEY, text, "nothing, if that is wanted")
    state = read_json(sound[0] / "state.json")
    if isinstance(state, dict):
        try:
            yield from _another_run(here, folder, sound[0], state)
        except (KeyError, TypeError, AttributeError):
            yield warning(KEY, f"{sound[0]}/state.json is not what VectorLM writes", ANOTHER)


def _foreign(here: Surroundings, checkpoint: Path) -> Iterator[Finding]:
    owner = checkpoint.stat().st_uid
    if owner != os.geteuid() and not here.config.train_parameters.allow_foreign_checkpoints:
        yield error(
            KEY,
            f"{checkpoint} belongs to another user ({owner}), not to you ({os.geteuid()})",
            "if you trust it, set train_parameters.allow_foreign_checkpoints: true",
        )


def _is_whole(checkpoint: Path) -> bool:
    """By the sizes; hashes are the trainer's to compare."""
    try:
        files = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / n).stat().st_size == e["bytes"] for n, e in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _another_run(
    here: Surroundings, folder: Path, checkpoint: Path, state: dict[str, Any]
) -> Iterator[Finding]:
    train = here.config.train_parameters
    fixed = among(changes(here.config, state), FIXED)
    data = _fingerprint(here)
    if data is not None and state["data"] != data:
        fixed.append("the training data")
    if fixed:
        text = f"{folder} holds checkpoints made with other settings: {', '.join(fixed)}"
        if train.resume_despite_changes:
            yield note(KEY, text, "the run goes on from them, as resume_despite_changes says")
        else:
            yield error(
                KEY,
                text,
                "put them back, give another output_dir, or set "
                "train_parameters.resume_despite_changes: true",
            )
    yield from _another_batch(here, folder, state)
    if not fixed and state["epoch"] >= train.epochs:
        yield warning(
            KEY,
            f"{folder} holds a run that has finished ({checkpoint.name}, {state['epoch']} of "
            f"{train.epochs} epochs): there is nothing left to train",
            "raise train_parameters.epochs to go on, or give another output_dir",
        )
    elif not fixed:
        text = f"the run goes on from {checkpoint}"
        yield note(KEY, text, "to begin anew, give another output_dir")


def _fingerprint(here: Surroundings) -> str | None:
    if here.config.dataset is None:
        return None
    try:
        return read_manifest(here.config.dataset.train_ds).fingerprint()
    except DataError:
        return None


def _another_batch(here: Surroundings, folder: Path, state: dict[str, Any]) -> Iterator[Finding]:
    data, train = here.config.dataset, here.config.train_parameters
    if data is None or train.resume_despite_changes:
        return
    a_rank = data.train_bs * train.gradient_accumulation_steps
    if a_rank == state["rank_batch"] or (here.ranks or 1) * a_rank == state["global_batch"]:
        return
    yield error(
        "dataset.train_bs",
        f"{folder} holds checkpoints made with {state['global_batch']} rows a step "
        f"({state['rank_batch']} on each of {state['world']} ranks), and the file says {a_rank} "
        "on each",
        "put train_bs and gradient_accumulation_steps back, give another output_dir, or set "
        "train_parameters.resume_despite_changes: true",
    )
