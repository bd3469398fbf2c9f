"""What `vectorlm submit` does without Slurm; with it: tests/slurm/test_submit.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vectorlm import cli
from vectorlm.cluster.script import render, render_preprocess
from vectorlm.cluster.submit import make_plan, submit, table
from vectorlm.config.load import load_config
from vectorlm.errors import ClusterError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
model: m
train_parameters: {output_dir: out, max_seq_len: 8}
dataset: {train_ds: rows}
slurm: {gpus_per_node: 2, setup: ["module load cuda"]}
"""
PREPARE = "dataset_preprocess: {load_path: raw.jsonl, save_path: rows}\n"
SWEEP = """\
sweep:
  metric: loss
  at_once: 2
  grid: {train_parameters.optimizer.lr: [1.0e-5, 2.0e-5], train_parameters.seed: [1, 2]}
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str, name: str = "c.yaml") -> str:
    Path(name).write_text(text)
    return name


# --- printing -------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_alone(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    name = written(BASE, os.fsdecode(b"it's \xff.yaml"))
    assert cli.main(["submit", "--config", name, "--dry-run"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == os.fsencode(render(load_config(name), name))
    assert b"error: model: there is no folder" in err  # what `check` finds is told beside it
    assert os.listdir() == [name]


def test_a_dry_run_takes_overrides(capfd: pytest.CaptureFixture[str]) -> None:
    path = written(BASE)
    command = ["submit", "--config", path, "--dry-run", "--set", "slurm.nodes=3"]
    assert cli.main([*command, "--set", "model=x\n#SBATCH --wrap=touch canary"]) == 0
    out, err = capfd.readouterr()
    assert out == render(load_config(path, ["slurm.nodes=3"]), path)
    assert "--set" in err


def test_a_dry_run_with_preprocessing_prints_both(capfd: pytest.CaptureFixture[str]) -> None:
    path = written(BASE + PREPARE)
    assert cli.main(["submit", "--config", path, "--dry-run", "--with-preprocess"]) == 0
    config = load_config(path)
    both = render_preprocess(config, path) + "\n" + render(config, path)
    assert capfd.readouterr().out == both


def test_a_dry_run_of_a_sweep_is_an_array(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--config", written(BASE + SWEEP), "--dry-run"]) == 0
    assert "#SBATCH --array=0-3%2\n" in capfd.readouterr().out


def test_submitting_needs_no_heavy_library() -> None:
    block = "import sys\nfor name in ('torch', 'transformers', 'datasets', 'peft', 'pyarrow'):\n"
    code = f"{block}    sys.modules[name] = None\nfrom vectorlm.cli import main\n"
    code += f"sys.exit(main(['submit', '--dry-run', '--config', {written(BASE + SWEEP)!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- planning -------------------------------------------------------------------------------------


def test_points_have_folders_and_configurations_of_their_own() -> None:
    plan = make_plan(written(BASE + SWEEP), ["train_parameters.epochs=3"])
    found = [
        (p.folder, p.config.train_parameters.optimizer.lr, p.config.train_parameters.seed)
        for p in plan.points
    ]
    assert found == [
        (Path("out/000"), 1e-5, 1),
        (Path("out/001"), 1e-5, 2),
        (Path("out/002"), 2e-5, 1),
        (Path("out/003"), 2e-5, 2),
    ]
    assert {p.config.train_parameters.epochs for p in plan.points} == {3}
    assert {p.config.sweep for p in plan.points} == {None}
    assert table(plan.points[1:3]) == (
        "run      train_parameters.optimizer.lr  train_parameters.seed\n"
        "out/001  1e-05                          2\n"
        "out/002  2e-05                          1"
    )


def test_every_mistake_of_a_sweep_is_told_now() -> None:
    path = written(BASE + SWEEP.replace("[1, 2]", "[1, -2]").replace("2.0e-5", "-1.0"))
    with pytest.raises(ConfigError) as caught:
        make_plan(path, [])
    text = str(caught.value)
    assert "train_parameters.seed" in text
    assert "train_parameters.optimizer.lr" in text


@pytest.mark.parametrize(
    ("text", "with_preprocess", "said"),
    [
        (BASE.replace("slurm: ", "wandb_config: "), False, "c.yaml: slurm: section is missing"),
        (BASE.replace("dataset: ", "wandb_config: "), False, "dataset: section is missing"),
        (BASE, True, "dataset_preprocess: section is missing"),
    ],
)
def test_a_section_is_needed(text: str, with_preprocess: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        make_plan(written(text), [], with_preprocess)


@pytest.mark.parametrize(
    "line", ["echo 'open", "if true; then", "cat <<EOF", "f() {", "echo )", "x=$(date"]
)
def test_setup_lines_that_would_swallow_ours(line: str) -> None:
    path = written(BASE)
    with pytest.raises(ClusterError, match=r"slurm\.setup: bash cannot read these lines: .*line"):
        make_plan(path, [f'slurm.setup=["true", "{line}"]'])


def test_setup_lines_may_belong_together() -> None:
    lines = 'slurm.setup=["if true; then", "  export A=1", "fi"]'
    assert "\n  export A=1\n" in make_plan(written(BASE), [lines]).script


def test_a_sweep_over_prepared_data_needs_it_first() -> None:
    over = 'sweep.grid={"train_parameters.max_seq_len": [8, 16]}'
    path = written(BASE + PREPARE + SWEEP)
    assert len(make_plan(path, [over]).points) == 2
    with pytest.raises(ClusterError, match="its runs ask for 2 kinds of prepared data"):
        make_plan(path, [over], with_preprocess=True)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(written(BASE), [])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match="squeue is not on PATH; are you on a machine"):
        submit(plan)
    assert os.listdir() == ["c.yaml"]
