"""What a run takes of the host's memory, against a real one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import write_rows
from vectorlm.config.schema import Config
from vectorlm.plan.outlook import make_outlook

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
LIMIT_S = 120.0


def most_anonymous_bytes(command: list[str]) -> int:
    """The most that a process held of its own, beside what files are mapped to."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    most, until = 0, time.monotonic() + LIMIT_S
    try:
        while process.poll() is None and time.monotonic() < until:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            most = max(most, int(found[1]) * 1024 if found else 0)
            time.sleep(0.02)
        assert process.wait(timeout=1) == 0
    finally:
        process.kill()
        process.wait()
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_rank_without_gpus_takes_what_is_planned(model_folder: Any, tmp_path: Path) -> None:
    """A tiny model: libraries are nearly all of it."""
    from vectorlm.data.tokenize import load_tokenizer

    model = str(model_folder("llama"))
    sha256 = load_tokenizer(model).sha256
    write_rows(tmp_path / "data", [[[5] * 60]] * 8, 64, tokenizer_sha256=sha256)
    config = {
        "model": model,
        "train_parameters": {"output_dir": str(tmp_path / "o"), "max_seq_len": 64},
        "dataset": {"train_ds": str(tmp_path / "data"), "train_bs": 2},
        "slurm": {"gpus_per_node": 0},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    planned = make_outlook(Config.model_validate(config)).host_bytes
    measured = most_anonymous_bytes([sys.executable, "-m", "vectorlm.train", "--config", str(path)])
    assert 0.1 * GIB < measured < planned < 2 * measured
