"""Folders, and the file systems they lie on."""

from __future__ import annotations

from pathlib import Path

from vectorlm.check.places import cannot_write, existing_parent, free, gib, mount_of

MOUNTS = r"""/dev/sda1 / ext4 rw 0 0
srv:/home /home nfs4 rw 0 0
tmpfs /home/my\040name tmpfs rw 0 0
"""


def test_existing_parent(tmp_path: Path) -> None:
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(tmp_path / "a/b/c") == tmp_path
    assert existing_parent(tmp_path / "a/../b") == tmp_path


def test_cannot_write(tmp_path: Path) -> None:
    assert cannot_write(tmp_path / "new/folder") is None
    (tmp_path / "file").write_text("")
    assert cannot_write(tmp_path / "file/folder") == f"{tmp_path / 'file'} is a file"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert cannot_write(tmp_path / "link") == f"{tmp_path / 'link'} is a link that leads nowhere"


def test_mounts(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    home = mount_of(Path("/home/someone/away"), mounts)
    assert home
    assert (home.device, home.kind) == ("srv:/home", "nfs4")
    own = mount_of(Path("/home/my name/x"), mounts)
    assert own
    assert own.kind == "nfs4"  # the folder is not there, so what is above it counts
    assert mount_of(tmp_path, tmp_path / "none") is None


def test_room(tmp_path: Path) -> None:
    room = free(tmp_path / "to/come", 5)
    assert room.problem is None
    assert room.free_bytes
    assert gib(3 << 30) == "3.0 GiB"
    assert gib(5 << 20) == "5.0 MiB"
