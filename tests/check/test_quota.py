"""What `quota` and `lfs quota` print, from commands that print it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.check.project import program
from vectorlm.check import quota
from vectorlm.check.places import Mount
from vectorlm.check.quota import left

# As `quota -p -w` of Linux and `lfs quota -q` of Lustre print it.
NFS = """Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
srv:/scratch 100 0 200 0 5 0 0 0
srv:/home 2048 0 4096 0 90 0 100 0"""
OVER = NFS.replace("2048 0 4096 0 90 0 100 0", "5000* 0 4096 6days 90 0 100 0")
LUSTRE = "/lustre 1024 0 3072 - 10 0 1000 -"


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "mount_of", lambda path: Mount("srv:/home", Path("/home"), "nfs4"))


def environ(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.usefixtures("mounted")
def test_quota(tmp_path: Path) -> None:
    program(tmp_path, "quota", NFS)
    assert left(tmp_path, environ(tmp_path)) == [(2048 << 10, 10, "are left of your quota")]
    program(tmp_path, "quota", OVER, code=1)
    assert left(tmp_path, environ(tmp_path)) == [(0, 10, "are left of your quota")]


def test_lustre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "mount_of", lambda path: Mount("x", Path("/lustre"), "lustre"))
    program(tmp_path, "lfs", LUSTRE)
    assert left(tmp_path, environ(tmp_path)) == [(2048 << 10, 990, "are left of your quota")]


@pytest.mark.usefixtures("mounted")
@pytest.mark.parametrize("said", ["", "quota: Cannot resolve", NFS.replace("home", "other")])
def test_nothing_where_nothing_is_said(said: str, tmp_path: Path) -> None:
    program(tmp_path, "quota", said, code=1)
    assert left(tmp_path, environ(tmp_path)) == []
    assert left(tmp_path, {"PATH": "/nowhere"}) == []


@pytest.mark.usefixtures("mounted")
def test_no_limit_is_no_quota(tmp_path: Path) -> None:
    program(tmp_path, "quota", "srv:/home 2048 0 0 0 90 0 0 0")
    assert left(tmp_path, environ(tmp_path)) == [(None, None, "are left of your quota")]


@pytest.mark.usefixtures("mounted")
def test_a_command_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "PATIENCE_S", 0.3)
    path = tmp_path / "quota"
    path.write_text("#!/bin/sh\nexec sleep 20\n")
    path.chmod(0o755)
    assert left(tmp_path, environ(tmp_path)) == []
