"""`vectorlm plan` as it is called: light, quick, and what each option does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vectorlm.cli import main
from vectorlm.config.load import load_config
from vectorlm.errors import ConfigError
from vectorlm.plan_door import parse_gpu

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
MOST_BYTES = 300 * 10**6
MOST_CPU_S = 1.5


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    values = {
        "model": str(tmp_path),
        "train_parameters": {
            "output_dir": str(tmp_path / "o"),
            "max_seq_len": 4096,
            "use_mp": True,
        },
        "dataset": {"train_ds": str(tmp_path / "absent"), "train_bs": 4},
        "slurm": {"gpus_per_node": 4, "gpu_type": "a100"},
    }
    path = tmp_path / "run.yaml"
    path.write_text("# mine\n" + yaml.safe_dump(values))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["plan", *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_it_is_light_and_quick(file: Path) -> None:
    """A login node has little memory, and torch may be slow to load there."""
    code = f"""
import re, resource, sys
from vectorlm.cli import main
main(["plan", "--config", {str(file)!r}, "--json"])
heavy = [name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules]
used = resource.getrusage(resource.RUSAGE_SELF)
# Not its ru_maxrss, which begins with what the process that started this one has held.
memory = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(heavy, memory, used.ru_utime + used.ru_stime, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy, _, figures = done.stderr.strip().rpartition("] ")
    memory, seconds = map(float, figures.split())
    assert heavy == "["
    assert memory < MOST_BYTES
    assert seconds < MOST_CPU_S  # of computing: others may keep this machine busy
    assert json.loads(done.stdout)["fits"] is False


def test_verdict_and_changes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--config", str(file))
    assert "DOES NOT FIT" in text
    assert "4 x A100-80GB" in text
    assert "--apply N writes one into the file." in text


def test_what_fits_needs_no_changes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--config", str(file), "--set", "dataset.train_bs=1")
    assert "\nFITS: " in text
    assert "--apply" not in text


def test_gpu_by_name_and_count(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(said(capsys, "--config", str(file), "--json", "--gpu", "h100:8"))
    assert (values["gpu"], values["ranks"]) == ("H100", 8)
    assert values["changes"] == [] or not values["fits"]


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("a100:4", "A100-80GB", 4),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", None),
        ("v100-32:2", "V100-32GB", 2),
    ],
)
def test_gpu_is_read(text: str, name: str, count: int | None) -> None:
    gpu, number = parse_gpu(text)
    assert gpu
    assert (gpu.name, number) == (name, count)


@pytest.mark.parametrize("text", ["abacus", "a100:0", "a100:many", "a100:", ":4", "a100:-1"])
def test_gpu_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="plan --gpu"):
        parse_gpu(text)


@pytest.mark.parametrize(
    ("beside", "fits", "shown", "in_tables"),
    [
        (-3, False, "DOES NOT FIT: ", "no"),
        (0, None, "TOO CLOSE TO CALL: ", "close"),
        (3, True, "FITS: ", "yes"),
    ],
)
def test_near_the_limit_all_say_the_same(
    beside: int,
    fits: bool | None,
    shown: str,
    in_tables: str,
    file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Table, picture and --json, on a part of a GPU of about the size that is needed; whatever the
    answer, to have answered is a success."""
    words = ["--config", str(file), "--set", "dataset.train_bs=2"]
    needed = json.loads(said(capsys, *words, "--json"))["needed_gib"]
    words += ["--gpu", f"a100_7g.{round(needed / 0.97) + beside}gb"]
    values = json.loads(said(capsys, *words, "--json"))
    assert values["fits"] is fits
    close = abs(values["capacity_gib"] - values["needed_gib"]) <= values["doubt_gib"]
    assert close is (fits is None)
    assert values["why_open"].startswith("too close to call: ") is close
    assert bool(values["changes"]) is (fits is not True)
    text = said(capsys, *words)
    assert f"\n{shown}" in text
    assert text.lower().count("too close to call") == close
    rows = said(capsys, *words, "--compare").splitlines()
    assert next(row for row in rows if row.startswith(" FULL_SHARD  ")).split()[-1] == in_tables
    largest = json.loads(said(capsys, *words, "--find-batch", "--json"))["largest_micro_batch"]
    assert (largest >= 2) is (fits is True)


def test_pure_bf16_is_applied(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--config", str(file), "--json"))["changes"]
    number = next(i for i, c in enumerate(found, 1) if "pure bf16" in c["title"])
    said(capsys, "--config", str(file), "--apply", str(number))
    assert load_config(file).train_parameters.effective_precision == "bf16-true"


def test_largest_batch(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--config", str(file), "--find-batch")
    assert "largest micro-batch that fits has 2 rows: dataset.train_bs: 2, " in text
    assert "gradient_accumulation_steps: 2. As many tokens a second" in text
    values = json.loads(said(capsys, "--config", str(file), "--find-batch", "--json"))
    assert (values["largest_micro_batch"], values["gradient_accumulation_steps"]) == (2, 2)
    few = ["--gpu", "h200:8", "--set", "dataset.train_bs=1"]
    assert "Tokens a second: +3%" in said(capsys, "--config", str(file), "--find-batch", *few)
    one = said(capsys, "--config", str(file), "--find-batch", "--gpu", "a100:1")
    assert "Not even a micro-batch of one row fits" in one


def test_comparison(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "NO_SHARD + checkpointing" in said(capsys, "--config", str(file), "--compare")
    rows = json.loads(said(capsys, "--config", str(file), "--compare", "--json"))
    assert len(rows) == 8
    assert {"strategy", "fits", "peak_gib"} <= rows[0].keys()


def test_a_change_is_applied(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--config", str(file), "--json"))["changes"]
    number = next(i for i, c in enumerate(found, 1) if c["title"] == "activation checkpointing")
    text = said(capsys, "--config", str(file), "--apply", str(number))
    assert "train_parameters.use_activation_checkpointing: true" in text
    assert load_config(file).train_parameters.use_activation_checkpointing
    assert file.read_text().startswith("# mine\n")
    after = json.loads(said(capsys, "--config", str(file), "--json"))
    assert after["fits"] is True
    assert after["peak_gib"] == found[number - 1]["peak_gib"]


def test_no_such_change(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(file), "--apply", "99"]) == 2
    assert "there is no change 99" in capsys.readouterr().err


def test_more_gpus_are_nothing_that_a_file_without_slurm_says(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(file), "--set", "slurm=null", "--gpu", "a100:4"]
    found = json.loads(said(capsys, *words, "--json"))["changes"]
    number = next(i for i, change in enumerate(found, 1) if not change["patch"])
    assert main(["plan", *words, "--apply", str(number)]) == 2
    assert "is nothing that the file says" in capsys.readouterr().err


def test_of_a_sweep_the_heaviest_run_is_planned(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"grid": {"dataset.train_bs": [1, 2]}, "metric": "loss"}
    file.write_text(file.read_text() + yaml.safe_dump({"sweep": grid}))
    text = said(capsys, "--config", str(file))
    assert 'a sweep of 2 runs; of them this one needs most memory: {"dataset.train_bs": 2}' in text
    assert json.loads(said(capsys, "--config", str(file), "--json"))["micro_batch"] == 2


def test_a_run_calibrates(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(file), "--set", "dataset.train_bs=1", "--json"]
    before = json.loads(said(capsys, *words))
    saved = tmp_path / "o/checkpoints/step_00000001"
    saved.mkdir(parents=True)
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    config["dataset"]["train_bs"] = 1
    (saved / "state.json").write_text(json.dumps({"config": config, "world": 4}))
    line = json.dumps({"step": 1, "memory_gib": 1.05 * before["peak_gib"]})
    (tmp_path / "o/metrics.jsonl").write_text(line)
    text = said(capsys, "--calibrate", str(tmp_path / "o"))
    assert "plans for A100-80GB are corrected by +5.0% from now on" in text
    after = json.loads(said(capsys, *words))
    assert after["peak_gib"] == pytest.approx(1.05 * before["peak_gib"], rel=0.001)


def test_a_run_that_is_not_there_cannot_calibrate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--calibrate", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder here; give the output_dir" in capsys.readouterr().err


def test_an_unknown_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(file), "--set", "model=no/such"]) == 2
    assert "hf download no/such" in capsys.readouterr().err


@pytest.mark.slow
def test_simulation_stands_beside_the_estimate(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With one row a moment is highest by far; with more, the loss and the blocks nearly tie.
    words = ["--config", str(file), "--set", "dataset.train_bs=1", "--simulate"]
    assert "simulated: " in said(capsys, *words)
    values = json.loads(said(capsys, *words, "--json"))
    assert values["simulated"]["peak_gib"] == pytest.approx(values["peak_gib"], rel=0.05)
    assert values["simulated"]["moment"] == values["moment"]
