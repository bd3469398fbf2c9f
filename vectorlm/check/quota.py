"""What a user's quota leaves, where `lfs quota` or `quota` answer. Floor 1, used by
`output_folder`.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vectorlm.check.places import mount_of

PATIENCE_S = 3.0
Left = tuple[int | None, int | None, str]
# blocks in KiB, soft, hard, perhaps a grace; then the same of files
_NUMBERS = re.compile(r"(\d+)\*?\s+(\d+)\s+(\d+)\s+(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)")


def left(path: Path, environ: Mapping[str, str]) -> list[Left]:
    """(bytes, files, how to say it); nothing where there is no quota, or nobody answers."""
    mount = mount_of(path)
    if mount is None:
        return []
    if mount.kind == "lustre":
        text = _ask(["lfs", "quota", "-q", "-u", getpass.getuser(), str(mount.point)], environ)
    else:
        text = _ask(["quota", "-p", "-w"], environ)
        lines = [line for line in text.splitlines() if line.split()[:1] == [mount.device]]
        text = "\n".join(lines)
    found = _NUMBERS.search(text)
    if found is None:
        return []
    used_kib, _, most_kib, _, files, _, most_files = found.groups()
    free_bytes = max(0, int(most_kib) - int(used_kib)) << 10 if int(most_kib) else None
    free_files = max(0, int(most_files) - int(files)) if int(most_files) else None
    return [(free_bytes, free_files, "are left of your quota")]


def _ask(command: list[str], environ: Mapping[str, str]) -> str:
    program = shutil.which(command[0], path=environ.get("PATH", os.defpath))
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout  # `quota` ends with 1 when a limit is passed
