"""Checkpoints: whole or not at all, every byte checked, nothing in them can run code."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vectorlm import checkpoint
from vectorlm.checkpoint import MANIFEST, STATE, Checkpoints
from vectorlm.distributed import Ranks
from vectorlm.errors import CheckpointError, ClusterError
from vectorlm.files import write_synced

STATE_OF_RUN = {"step": 1, "epoch": 0, "row": 4, "names": {"weight": "exported.weight"}}
ZIP_MAGIC = b"PK\x03\x04"


def tensors(value: float = 1.0, size: int = 64) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(float(size)).reshape(4, -1) * value,
        "optimizer.weight.step": torch.tensor(value),
        "rng.0.cpu": torch.get_rng_state(),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def checkpoints(folder: Path, ranks: Ranks, keep: int = 2, foreign: bool = False) -> Checkpoints:
    return Checkpoints(str(folder), ranks, keep, foreign)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_folders(folder)]


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def saved(tmp_path: Path, one_rank: Ranks) -> Checkpoints:
    """Sound checkpoints of steps 1 and 2."""
    made = checkpoints(tmp_path, one_rank)
    for step in (1, 2):
        made.save(step, tensors(step), STATE_OF_RUN | {"step": step})
    return made


def newest(made: Checkpoints) -> Path:
    return checkpoint.step_folders(made.output_dir)[0]


def rehash(folder: Path) -> None:
    """What someone who changes a checkpoint on purpose would do as well."""
    entries = {p.name: checkpoint._entry(p) for p in folder.iterdir() if p.name != MANIFEST}
    write_synced(folder / MANIFEST, json.dumps({"format": 1, "files": entries}))


# --- what is written -----------------------------------------------------------------


def test_what_is_saved_comes_back(saved: Checkpoints) -> None:
    found = saved.find()
    assert found.folder is not None
    assert (found.folder.name, found.skipped) == ("step_00000002", {})
    wanted = tensors(2)
    loaded = blank(wanted)
    saved.load(found.folder, loaded)
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor), name
    assert checkpoint.read_state(found.folder) == STATE_OF_RUN | {"step": 2}


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path, one_rank: Ranks) -> None:
    found = checkpoints(tmp_path, one_rank).find()
    assert (found.folder, found.skipped) == (None, {})
    assert checkpoint.newest(tmp_path) is None


def test_folders_are_private(saved: Checkpoints) -> None:
    for folder in (saved.root, newest(saved)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_manifest_lists_every_file_and_is_written_last(saved: Checkpoints) -> None:
    folder = newest(saved)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {MANIFEST}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == MANIFEST


def test_a_save_that_dies_before_the_manifest_leaves_no_checkpoint(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "_publish", dies)
    with pytest.raises(KeyboardInterrupt):
        saved.save(3, tensors(3), STATE_OF_RUN)
    assert len(list(saved.root.iterdir())) == 3
    assert steps(saved.root.parent) == [2, 1]
    saved.remove_unfinished()
    assert len(list(saved.root.iterdir())) == 2


def test_a_save_that_another_start_has_cleared_away(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told is that the folder was lost, and not that a file is missing."""
    finish = saved._finish_files

    def cleared(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        saved.remove_unfinished()
        return finish(folder, state)

    def taken() -> None:
        raise ClusterError("now belongs to another start of the run")

    monkeypatch.setattr(saved, "_finish_files", cleared)
    with pytest.raises(CheckpointError, match="could not be saved"):
        saved.save(3, tensors(3), STATE_OF_RUN)
    monkeypatch.setattr(saved, "require_folder", taken)
    with pytest.raises(ClusterError, match="another start"):
        saved.save(3, tensors(3), STATE_OF_RUN)


def test_no_file_is_a_plain_pickle(saved: Checkpoints) -> None:
    for path in newest(saved).iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            assert content.startswith(ZIP_MAGIC), path.name


def test_the_index_is_made_of_few_classes(saved: Checkpoints) -> None:
    with torch.serialization.safe_globals(checkpoint._INDEX_CLASSES):
        index = torch.load(newest(saved) / ".metadata", weights_only=True)
    assert set(index.state_dict_metadata) == set(tensors())


def test_the_index_does_not_name_folders(saved: Checkpoints) -> None:
    """The run may be moved, and the temporary folder's name is nobody's business."""
    assert str(saved.root).encode() not in (newest(saved) / ".metadata").read_bytes()


def test_a_moved_run_is_still_read(saved: Checkpoints, tmp_path: Path) -> None:
    moved = shutil.copytree(saved.root, tmp_path / "moved" / "checkpoints").parent
    shutil.rmtree(saved.root)
    elsewhere = checkpoints(moved, saved.ranks)
    loaded = blank(tensors(2))
    folder = elsewhere.find().folder
    assert folder is not None
    elsewhere.load(folder, loaded)
    assert torch.equal(loaded["model.weight"], tensors(2)["model.weight"])


def test_parameters_are_read_whole_under_exported_names(saved: Checkpoints) -> None:
    read = dict(checkpoint.read_parameters(newest(saved)))
    assert read.keys() == {"exported.weight"}
    assert torch.equal(read["exported.weight"], tensors(2)["model.weight"])


def test_the_step_again_replaces_the_old(saved: Checkpoints) -> None:
    folder = saved.save(2, tensors(5), STATE_OF_RUN)
    read = dict(checkpoint.read_parameters(folder))
    assert torch.equal(read["exported.weight"], tensors(5)["model.weight"])
    assert sorted(path.name for path in saved.root.iterdir()) == ["step_00000001", "step_00000002"]


# --- what is kept --------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, one_rank: Ranks, keep: int) -> None:
    made = checkpoints(tmp_path, one_rank, keep)
    for step in range(1, 6):
        made.save(step, tensors(step), STATE_OF_RUN)
        assert steps(tmp_path) == list(range(step, max(0, step - keep), -1))


def test_newer_steps_are_never_deleted(tmp_path: Path, one_rank: Ranks) -> None:
    """After a resume from an older one, the damaged newer ones stay until they are replaced."""
    made = checkpoints(tmp_path, one_rank, keep=1)
    for step in (7, 9):
        shutil.copytree(made.save(step, tensors(), STATE_OF_RUN), tmp_path / f"copy{step}")
    shutil.copytree(tmp_path / "copy7", made.root / "step_00000007")
    for folder in checkpoint.step_folders(tmp_path):
        flip(folder)
    made.save(3, tensors(), STATE_OF_RUN)
    made.save(4, tensors(), STATE_OF_RUN)
    assert steps(tmp_path) == [9, 7, 4]


# --- what is found -------------------------------------------------------------------


def flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)


def zeros(folder: Path) -> None:
    """What a crashed file system leaves of a file: its length, and nothing in it."""
    (folder / MANIFEST).write_bytes(bytes((folder / MANIFEST).stat().st_size))


def rewritten(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / MANIFEST).write_text(content)

    return damage


def removed(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip, "__0_0.distcp is damaged"),
    "truncated": (truncate, r"__0_0.distcp has \d+ bytes, not \d+"),
    "missing tensors": (removed("__0_0.distcp"), "__0_0.distcp is missing"),
    "missing state": (removed(STATE), "state.json is missing"),
    "missing index": (removed(".metadata"), ".metadata is missing"),
    "no manifest": (removed(MANIFEST), "MANIFEST.json is missing"),
    "manifest of zeros": (zeros, "MANIFEST.json cannot be read"),
    "manifest cut off": (rewritten('{"format": 1, "fil'), "MANIFEST.json cannot be read"),
    "manifest of another kind": (rewritten("[]"), "MANIFEST.json"),
    "manifest without files": (rewritten('{"format": 1}'), "MANIFEST.json"),
    "manifest that lists nothing": (rewritten('{"format": 1, "files": {}}'), "MANIFEST.json"),
    "manifest of a later format": (rewritten('{"format": 99, "files": {}}'), "MANIFEST.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(saved: Checkpoints, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(newest(saved))
    found = saved.find()
    assert found.folder is not None
    assert found.folder.name == "step_00000001"
    assert list(found.skipped) == ["step_00000002"]
    assert re.search(reason, found.skipped["step_00000002"])
    assert checkpoint.newest(saved.output_dir) == found.folder


def test_all_are_damaged(saved: Checkpoints) -> None:
    for folder in checkpoint.step_folders(saved.output_dir):
        flip(folder)
    found = saved.find()
    assert found.folder is None
    assert list(found.skipped) == ["step_00000002", "step_00000001"]


def test_folders_of_other_names_do_not_count(saved: Checkpoints) -> None:
    folder = newest(saved)
    for name in ("step_00000009.bak", "copy_of_step_00000009", "step_x", "step_9"):
        shutil.copytree(folder, saved.root / name)
    (saved.root / "notes.txt").write_text("mine")
    assert saved.find().folder == folder


def test_an_empty_step_folder_is_skipped(saved: Checkpoints) -> None:
    (saved.root / "step_00000009").mkdir()
    found = saved.find()
    assert found.skipped == {"step_00000009": "MANIFEST.json is missing, so it was never finished"}


def test_a_file_named_as_a_checkpoint_is_skipped(saved: Checkpoints) -> None:
    (saved.root / "step_00000009").write_text("")
    assert saved.find().folder == saved.root / "step_00000002"


def test_what_was_left_unfinished_is_removed_at_the_start(saved: Checkpoints) -> None:
    before = everything(saved.root)
    for name in ("step_00000003-abc", "step_00000001-def-replaced"):
        shutil.copytree(newest(saved), saved.root / f".unfinished-{name}")
    saved.remove_unfinished()
    assert everything(saved.root) == before


def test_other_users_checkpoints_are_refused(saved: Checkpoints) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(newest(saved), 4321, 4321)
    with pytest.raises(CheckpointError) as raised:
        saved.find()
    message = str(raised.value)
    assert str(newest(saved)) in message
    assert "belongs to user 4321, not to you (0)" in message
    assert "allow_foreign_checkpoints: true" in message
    trusting = checkpoints(Path(saved.output_dir), saved.ranks, foreign=True)
    assert trusting.find().folder == newest(saved)


def test_another_models_checkpoint_is_refused(saved: Checkpoints) -> None:
    wanted = blank(tensors()) | {"model.other": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*model\.other") as raised:
        saved.load(newest(saved), wanted)
    assert str(newest(saved)) in str(raised.value)


def test_another_shape_is_refused(saved: Checkpoints) -> None:
    wanted = blank(tensors()) | {"model.weight": torch.zeros(4, 8)}
    with pytest.raises(CheckpointError, match=r"does not fit this run: .*model\.weight"):
        saved.load(newest(saved), wanted)


# --- what a stranger put in ----------------------------------------------------------


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def plain_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb, protocol=2))


def zipped_pickle(path: Path, bomb: Any) -> None:
    with open(path, "wb") as file:
        torch.save(bomb, file)


@pytest.mark.parametrize("write", [plain_pickle, zipped_pickle])
def test_an_index_cannot_run_code(
    saved: Checkpoints, tmp_path: Path, write: Callable[[Path, Bomb], None]
) -> None:
    folder = newest(saved)
    mark = tmp_path / "ran"
    write(folder / ".metadata", Bomb(mark))
    rehash(folder)
    assert saved.find().folder == folder  # the hashes agree: they protect from accidents only
    with pytest.raises(CheckpointError, match=str(folder)):
        saved.load(folder, blank(tensors()))
    with pytest.raises(CheckpointError, match=str(folder)):
        dict(checkpoint.read_parameters(folder))
    assert not mark.exists()


def test_tensors_cannot_run_code(saved: Checkpoints, tmp_path: Path) -> None:
    """The index is sound and points into a file that holds something else than tensors."""
    folder = newest(saved)
    mark = tmp_path / "ran"
    zipped_pickle(folder / "__0_0.distcp", Bomb(mark))
    length = (folder / "__0_0.distcp").stat().st_size
    index = checkpoint._Reader(folder).read_metadata()
    for entry in index.storage_data.values():
        entry.offset, entry.length = 0, length
    zipped_pickle(folder / ".metadata", index)
    rehash(folder)
    with pytest.raises(CheckpointError, match=str(folder)):
        saved.load(folder, blank(tensors()))
    with pytest.raises(CheckpointError, match=str(folder)):
        dict(checkpoint.read_parameters(folder))
    assert not mark.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    """Guards the two tests above."""
    zipped_pickle(tmp_path / "file", Bomb(tmp_path / "ran"))
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").exists()


# --- when the disk is full -----------------------------------------------------------


DISK_BYTES = 4 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    """Leave `free` bytes on the disk, whatever else uses it."""
    with open(folder / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - free)


def large(value: float) -> dict[str, torch.Tensor]:
    return tensors(value, size=100_000)


def assert_not_saved(message: str, root: Path) -> None:
    assert str(root) in message
    assert "the disk is full or your quota is used up" in message
    assert "needed 0.39 MiB, free " in message
    assert "earlier checkpoints are intact" in message
    assert "keep_checkpoints" in message
    assert "Traceback" not in message


def test_too_little_space_is_seen_beforehand(small_disk: Path, one_rank: Ranks) -> None:
    made = checkpoints(small_disk, one_rank)
    made.save(1, large(1), STATE_OF_RUN)
    before = everything(made.root)
    fill(small_disk, 300_000)
    with pytest.raises(CheckpointError) as raised:
        made.save(2, large(2), STATE_OF_RUN)
    assert_not_saved(str(raised.value), made.root)
    assert "free 0.2" in str(raised.value)
    assert everything(made.root) == before
    assert [path.name for path in made.root.iterdir()] == ["step_00000001"]


def test_a_disk_that_fills_while_saving(small_disk: Path, one_rank: Ranks) -> None:
    """Enough space by the count of bytes, then page by page less than the files need.

    So the disk fills in the tensors, in the index, in the state and in the manifest.
    """
    made = checkpoints(small_disk, one_rank, keep=9)
    made.save(1, large(1), STATE_OF_RUN)
    before = everything(made.root)
    needed = checkpoint._whole_bytes(large(2))
    state = STATE_OF_RUN | {"long": "x" * 3 * PAGE}
    failures = 0
    for pages in range(1, 40):
        fill(small_disk, needed + pages * PAGE)
        try:
            made.save(2, large(2), state)
        except CheckpointError as error:
            failures += 1
            assert_not_saved(str(error), made.root)
            assert everything(made.root) == before
            assert [path.name for path in made.root.iterdir()] == ["step_00000001"]
        else:
            break
        finally:
            (small_disk / "ballast").unlink()
    assert failures >= 5
    assert steps(small_disk) == [2, 1]
    found = made.find()
    assert (found.folder, found.skipped) == (made.root / "step_00000002", {})


@pytest.fixture
def limited_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB, as under `ulimit -f` or an exhausted quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("limited_files")
def test_a_write_that_fails_midway(saved: Checkpoints) -> None:
    before = everything(saved.root)
    with pytest.raises(CheckpointError) as raised:
        saved.save(3, large(3), STATE_OF_RUN)
    assert_not_saved(str(raised.value), saved.root)
    assert everything(saved.root) == before
    assert len(list(saved.root.iterdir())) == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, one_rank: Ranks) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(
        CheckpointError, match=r"checkpoints: cannot be written: .*exists|Not a dir"
    ):
        checkpoints(tmp_path, one_rank).save(1, tensors(), STATE_OF_RUN)
