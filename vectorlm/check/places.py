"""Folders and the file systems they lie on. Floor 1; used by those who look at output, data and
cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vectorlm.machine import reason, within
from vectorlm.preflight import Folder

MOUNTS = Path("/proc/self/mounts")
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True)
class Mount:
    device: str
    point: Path
    kind: str


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one around it that is there."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def cannot_write(path: Path) -> str | None:
    """Why no file can be made in the folder (or, where it is not there yet, in what it would be
    made in); None when one can.
    """
    place = existing_parent(path)
    if not place.is_dir():
        return f"{place} is a file" if place.exists() else f"{place} is a link that leads nowhere"
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        return f"{place} is on a read-only file system" if read_only else f"{place} is not yours"
    return None


def free(path: Path, limit_s: float) -> Folder:
    """How much room there is; `problem` where it cannot be told."""
    place = existing_parent(path)

    def look() -> Folder:
        found = os.statvfs(place)
        files = found.f_favail if found.f_files else None
        return Folder(str(place), free_bytes=found.f_bavail * found.f_frsize, free_files=files)

    try:
        return within(limit_s, look)
    except (OSError, TimeoutError) as error:
        return Folder(str(place), problem=reason(error))


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount | None:
    """The file system a path lies on, from the kernel's list."""
    real = Path(os.path.realpath(existing_parent(path)))
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = [
        Mount(f[0], Path(_plain(f[1])), f[2]) for f in (x.split() for x in lines) if len(f) > 2
    ]
    around = [mount for mount in found if real.is_relative_to(mount.point)]
    return max(around, key=lambda mount: len(mount.point.parts), default=None)


def _plain(text: str) -> str:
    r"""Blanks and their like are written as \040."""
    return text.encode().decode("unicode_escape") if "\\" in text else text


def gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"
