"""The benchmark for GPUs, on a CPU: a tiny model goes through all of it but nvidia-smi."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import begin
from benchmarks.gpu import (
    LORA,
    POINTS,
    clocks,
    configuration,
    flops_per_token,
    mfu,
    reason,
    watch,
)
from benchmarks.gpu_table import CONTENDERS, against, clock_range
from benchmarks.subject import trainer
from vectorlm.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


@pytest.mark.slow
def test_tiny_model_goes_through_all_of_it(tmp_path: Path) -> None:
    done = gpu("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    assert [point["name"] for point in results["points"]] == ["tiny-full-64", "tiny-lora-64"]
    for point in results["points"]:
        assert point["planned"]["memory_gib"] > 0
        for name in ("vectorlm", "sdpa"):
            found = point["contenders"][name]
            assert found["tokens_per_s"] > 0, found
            assert found["mfu"] > 0
    assert done.stdout == (tmp_path / "table.md").read_text()
    assert "VectorLM's log: attention:" in done.stdout
    shown = gpu("--show", str(tmp_path / "results.json"))
    assert (shown.returncode, shown.stdout) == (0, done.stdout)


@pytest.mark.slow
def test_a_point_that_fails_is_a_line_that_says_why(tmp_path: Path) -> None:
    only = ("--points", "tiny-full-64", "--contenders", "vectorlm")
    broken = "train_parameters.optimizer.name=Nonsense"
    done = gpu("--tiny", "--out", str(tmp_path), *only, "--set", broken)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| `tiny")]
    assert "'Nonsense' is no optimizer" in line


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    done = gpu("--tiny", "--out", str(tmp_path), "--seconds", "-1")
    assert done.returncode == 1
    assert "No time was left for tiny-full-64, tiny-lora-64." in (tmp_path / "table.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = gpu("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "torch finds no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora", [None, {**LORA, "target_modules": ["q_proj", "down_proj"]}])
def test_mfu_is_that_of_the_log(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    with trainer(tmp_path, 2, lora_peft_config=lora) as made:
        made.metrics.close()
        config = {
            "model": str(tmp_path / "model"),
            "train_parameters": {"output_dir": "o", "max_seq_len": 512, "lora_peft_config": lora},
        }
        own = flops_per_token(Config.model_validate(config))
        assert own == made.metrics.work.flops_per_token
    assert mfu(1e6, Config.model_validate(config), "NVIDIA H200") == pytest.approx(own / 989e6)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\nto allocate", "out of memory"),
        ("Traceback\nValueError: no such thing\n\n", "ValueError: no such thing"),
        ("", "ended with 1"),
    ],
)
def test_why_a_contender_failed(tmp_path: Path, said: str, expected: str) -> None:
    run = begin("x", [sys.executable, "-c", f"import sys; print({said!r}); sys.exit(1)"], tmp_path)
    assert not watch(run, POINTS[0], True, 60, [])
    assert reason(run, 60) == expected


def test_one_that_takes_too_long_is_told(tmp_path: Path) -> None:
    run = begin("x", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path)
    assert not watch(run, POINTS[0], False, 0.2, [])
    assert reason(run, 0.2) == "not done after 0 s"
    run.end()


def test_points_have_names_of_their_own_and_sound_files(tmp_path: Path) -> None:
    assert len({point.name for point in POINTS}) == len(POINTS)
    for point in POINTS:
        config = Config.model_validate(configuration(point, tmp_path, tmp_path, tmp_path))
        assert config.train_parameters.lora_peft_config == (
            LORA if point.trained == "lora" else None
        )
        assert point.rows * point.length in (8_192, 16_384)
    assert {(p.model, p.trained, p.length) for p in POINTS} == {
        (model, trained, length)
        for model in ("1.1b", "8b")
        for trained in ("full", "lora")
        for length in (2048, 4096, 8192)
    }
    assert set(CONTENDERS) == {"vectorlm", "sdpa", "flash_attention_2"}


def test_clocks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi prints them, for the GPU that is used; what it does not know is left out."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "-i 3" ] && echo "1980, 3201, [N/A], 54"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = clocks()
    assert seen == {
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "[N/A]",
        "temperature.gpu": "54",
    }
    later = seen | {"clocks.sm": "1755"}
    found = {"clocks": {"during": [seen, later, {}]}}
    told = clock_range({"points": [{"contenders": {"vectorlm": found}}]})
    assert told == (" Seen while they ran: 1755-1980 MHz, 3201-3201 MHz of memory, 54-54 degrees.")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert clocks() == {}


def test_a_plan_is_told_with_how_far_it_is_off() -> None:
    assert against(11.0, 10.0, ".1f") == "11.0 (+10%)"
    assert against(11.0, None, ".1f") == "11.0"
    assert against(None, 10.0, ".1f") == ""
