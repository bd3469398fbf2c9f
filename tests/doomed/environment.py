"""Python environments that are not this one: virtual environments of links to it.

One lacks a package; the other has a torch that says it was built for GPUs, as on a cluster.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path


def without(folder: Path, package: str) -> Path:
    """The interpreter of a new environment where this package is not installed."""
    return _environment(folder, lambda name: name.partition("-")[0].lower() != package)


def for_gpus(folder: Path) -> Path:
    """The interpreter of a new environment whose torch is a CUDA build, as far as it says."""
    python = _environment(folder, lambda name: name != "torch")
    here, there = _packages() / "torch", _packages(folder) / "torch"
    there.mkdir()
    for entry in here.iterdir():
        if entry.name != "version.py":
            (there / entry.name).symlink_to(entry)
    text = (here / "version.py").read_text(encoding="utf-8")
    changed = re.sub(r"(?m)^cuda\b.*$", "cuda: Optional[str] = '12.8'", text)
    assert changed != text
    (there / "version.py").write_text(changed, encoding="utf-8")
    return python


def _environment(folder: Path, wanted: Callable[[str], bool]) -> Path:
    _packages(folder).mkdir(parents=True)
    for entry in _packages().iterdir():
        if wanted(entry.name) and entry.suffix != ".pth":
            (_packages(folder) / entry.name).symlink_to(entry)
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.symlink_to(Path(sys.executable).resolve())
    version = ".".join(map(str, sys.version_info[:3]))
    (folder / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\nversion = {version}\n")
    return python


def _packages(folder: Path = Path(sys.prefix)) -> Path:
    return folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
