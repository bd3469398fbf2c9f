"""What a run measured corrects the plans for its GPU, and only sensible measurements do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vectorlm.config.schema import Config
from vectorlm.errors import ConfigError, VectorLMError
from vectorlm.plan import calibration
from vectorlm.plan.gpus import GIB, Gpu, find_gpu
from vectorlm.plan.measured import read_run
from vectorlm.plan.outlook import make_outlook


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/vectorlm/calibration.json"


def gpu(name: str = "a100") -> Gpu:
    found = find_gpu(name)
    assert found
    return found


def test_the_median_of_the_runs_of_this_gpu() -> None:
    assert calibration.correction(gpu()) is None
    for run, measured in (("a", 101), ("b", 104), ("c", 110)):
        calibration.record(gpu(), run, 100 * GIB, measured * GIB)
    calibration.record(gpu("h100"), "d", 100 * GIB, 90 * GIB)
    assert calibration.correction(gpu()) == 1.04
    assert calibration.correction(gpu("h100")) == 0.9
    calibration.record(gpu(), "c", 100 * GIB, 100 * GIB)  # again: the newer counts
    assert calibration.correction(gpu()) == 1.01


def test_the_file_is_private(state: Path) -> None:
    calibration.record(gpu(), "a", 100, 101)
    assert state.parent.stat().st_mode & 0o077 == 0
    assert list(state.parent.iterdir()) == [state]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"A100-80GB": [{"ratio": 9}, 3]}', '{"A100-80GB": 1}']
)
def test_a_damaged_file_corrects_nothing(content: str, state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text(content)
    assert calibration.correction(gpu()) is None


@pytest.mark.parametrize("measured", [50, 200])
def test_what_is_too_far_off_is_refused(measured: int, state: Path) -> None:
    with pytest.raises(VectorLMError, match="too far off"):
        calibration.record(gpu(), "a", 100 * GIB, measured * GIB)
    assert not state.exists()


def test_a_state_folder_that_cannot_be_written(state: Path) -> None:
    state.parent.parent.write_text("a file")
    with pytest.raises(VectorLMError, match="cannot be written"):
        calibration.record(gpu(), "a", 100, 100)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
}


def run_folder(tmp_path: Path, measured: list[float], **slurm: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    folder = tmp_path / "out"
    saved = folder / "checkpoints/step_00000010"
    saved.mkdir(parents=True)
    config = {
        "model": str(tmp_path),
        "train_parameters": {"output_dir": str(folder), "max_seq_len": 512},
        "dataset": {"train_ds": "d", "train_bs": 2},
    } | ({"slurm": slurm} if slurm else {})
    (saved / "state.json").write_text(json.dumps({"config": config, "world": 4}))
    lines = [json.dumps({"step": i, "memory_gib": gib}) for i, gib in enumerate(measured)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "mem']))
    return folder


def test_a_run_says_what_it_held_and_where(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path, [2.5, 3.5, 3.0], gpus_per_node=2, gpu_type="a100"), None)
    assert run.peak_bytes == int(3.5 * GIB)
    assert (run.hardware.ranks, run.hardware.ranks_per_node) == (4, 2)
    assert run.hardware.gpu == gpu()
    assert isinstance(run.config, Config)


def test_the_preflight_knows_the_gpu(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [1.0])
    with pytest.raises(ConfigError, match="add --gpu NAME"):
        read_run(folder, None)
    facts = {"facts": [{"device": "NVIDIA H100 80GB HBM3"}]}
    (folder / "preflight.json").write_text(json.dumps(facts))
    assert read_run(folder, None).hardware.gpu == gpu("h100")
    assert read_run(folder, gpu()).hardware.gpu == gpu()


def test_a_run_without_a_gpu(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [])
    with pytest.raises(ConfigError, match="holds no memory_gib"):
        read_run(folder, gpu())


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [1.0])
    (folder / "checkpoints/step_00000010/state.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        read_run(folder, gpu())


def test_plans_are_corrected_and_say_so(tmp_path: Path) -> None:
    config = read_run(run_folder(tmp_path, [1.0]), gpu()).config
    before = make_outlook(config, gpu())
    calibration.record(gpu(), "a", 100, 110)
    after = make_outlook(config, gpu())
    assert after.peak_bytes == pytest.approx(1.1 * before.peak_bytes)
    assert any("+10.0%" in note for note in after.notes)
    assert sum(after.breakdown.values()) == pytest.approx(after.peak_bytes, abs=10)
    assert make_outlook(config, gpu("h100")).peak_bytes == before.peak_bytes
