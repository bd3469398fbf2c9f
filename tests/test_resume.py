"""Claiming an output folder: one run at a time, and no run refused for a dead one's sake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vectorlm.errors import ClusterError, ConfigError
from vectorlm.resume import claim

HOLD = """
import sys
from vectorlm.resume import claim
kept = claim(sys.argv[1])
print(flush=True)
input()
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "output")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(ClusterError, match=rf"in use by a run on this machine.*{first.pid}"):
        claim(str(tmp_path / "output"))
    first.kill()
    first.communicate()
    file, note = claim(str(tmp_path / "output"))
    assert file is not None
    assert note is None
    file.close()


def test_another_machine_is_told_but_not_obeyed(tmp_path: Path) -> None:
    held, _ = claim(str(tmp_path))
    assert held is not None
    (tmp_path / "run.lock").write_text("elsewhere 12")
    again, note = claim(str(tmp_path))
    assert note == f"{tmp_path}: a run on elsewhere may still be using it"
    assert again is not None
    again.close()
    held.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output_dir: .*file cannot be written"):
        claim(str(tmp_path / "file"))
