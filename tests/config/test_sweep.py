"""The runs of a sweep: which there are, in which order, and that each loads as what it says."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from tests.config.mistakes import BASE, DATASET, PREPARE
from vectorlm.config.load import config_to_dict, load_config
from vectorlm.config.schema import Config, Sweep
from vectorlm.config.sweep import MOST_RUNS, Point, overrides_of, sweep_points, total_runs
from vectorlm.errors import ConfigError

LR, SEED, EPOCHS = (f"train_parameters.{name}" for name in ("optimizer.lr", "seed", "epochs"))


def load(folder: Path, sweep: dict[str, Any], *overrides: str, more: str = "") -> Config:
    path = folder / "c.yaml"
    text = yaml.safe_dump({"sweep": sweep}, sort_keys=False)
    path.write_text(BASE + more + text, encoding="utf-8")
    return load_config(path, overrides)


def points(folder: Path, **sweep: Any) -> list[Point]:
    config = load(folder, sweep)
    assert config.sweep is not None
    found = sweep_points(config)
    assert total_runs(config.sweep) == len(found)
    assert found == sweep_points(config)  # and again
    return found


def test_no_sweep(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    assert sweep_points(load_config(path)) == []


def test_grid_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert points(tmp_path, grid={SEED: [2, 1], LR: [0.1, 0.2]}) == [
        {SEED: 2, LR: 0.1},
        {SEED: 2, LR: 0.2},
        {SEED: 1, LR: 0.1},
        {SEED: 1, LR: 0.2},
    ]
    assert [*points(tmp_path, grid={LR: [0.1], SEED: [1, 2]})[0]] == [LR, SEED]


def test_runs_one_by_one(tmp_path: Path) -> None:
    """The first is the file as it is, to compare with."""
    runs = [{}, {SEED: 3}, {LR: 0.5, EPOCHS: 2}]
    assert points(tmp_path, runs=runs) == runs


def test_each_of_the_runs_with_all_of_the_grid(tmp_path: Path) -> None:
    assert points(tmp_path, runs=[{EPOCHS: 2}, {LR: 0.5}], grid={SEED: [1, 2]}) == [
        {EPOCHS: 2, SEED: 1},
        {EPOCHS: 2, SEED: 2},
        {LR: 0.5, SEED: 1},
        {LR: 0.5, SEED: 2},
    ]


def test_grid_given_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    config = load_config(path, [f"sweep.grid.{SEED}=[1, 2]", "sweep.at_once=1"])
    assert config.sweep == Sweep(grid={SEED: [1, 2]}, at_once=1)
    with pytest.raises(ConfigError, match=rf"--set sweep\.grid\.{SEED}: is the number -2"):
        load_config(path, [f"sweep.grid.{SEED}=[1, -2]"])


# --- the way back ---------------------------------------------------------------------------------


def put(values: dict[str, Any], name: str, value: Any) -> None:
    *around, last = name.split(".")
    for part in around:
        values = values.setdefault(part, {})
    values[last] = value


def test_every_run_is_the_file_with_its_point(tmp_path: Path) -> None:
    sweep = {
        "metric": "loss",
        "grid": {
            "train_parameters.lora_peft_config": [None, {"r": 8, "target_modules": ["q", "v"]}],
            "train_parameters.optimizer.betas": [[0.9, 0.95], [0.8, 0.9]],
            "train_parameters.lr_scheduler_type": ["linear", "cosine"],
        },
        "runs": [
            {"wandb_config.tags": ["a=b", "c, d"], "dataset.train_ds": "a # b"},
            {"model": "007", LR: 1e-7, "train_parameters.use_mp": True, "wandb_config.x": "null"},
        ],
    }
    config = load(tmp_path, sweep, more=DATASET + PREPARE)
    found = sweep_points(config)
    assert len(found) == 16
    for point in found:
        values = yaml.safe_load(BASE + DATASET + PREPARE)
        for name, value in point.items():
            put(values, name, value)
        run = load_config(tmp_path / "c.yaml", overrides_of(point))
        assert run == Config.model_validate(values)
        assert run.sweep is None


def test_any_value_comes_back(tmp_path: Path) -> None:
    """Texts with whatever YAML, JSON or `--set` might read otherwise; numbers to the last digit."""
    random = Random(3)
    pieces = [
        *"\n\r\t\0\x7f\x85\u2028\ufeff \\\"'#:,[]{}=&*!|>%@`~-?<.$ä你\U0001f600",
        *(": ", " #", "null", "true", "1e3", "<<", "---", "a", "0"),
    ]

    def text() -> str:
        return "".join(random.choice(pieces) for _ in range(random.randint(0, 6)))

    values: list[Any] = [None, True, 0, -7, 10**30, 1e-7, 1e22, 5e-324, 0.1, "", [], {}, [[]]]
    values += [text() for _ in range(150)]
    values += [[text(), {text(): text()}] for _ in range(50)]
    point = {f"wandb_config.k{index}": value for index, value in enumerate(values)}
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    kept = load_config(path, overrides_of(point)).wandb_config
    assert list(kept.values()) == values
    assert [type(value) for value in kept.values()] == [type(value) for value in values]


def test_texts_of_text_keys_come_back(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + DATASET)
    for text in ("007", "null", "[a]", "### A: x", " a ", "'a'", '"', "a=b", "~", "ä\u2028"):
        dataset = load_config(path, overrides_of({"dataset.eval_ds": text})).dataset
        assert dataset is not None
        assert dataset.eval_ds == text


# --- what cannot be meant -------------------------------------------------------------------------


def told(folder: Path, sweep: dict[str, Any], more: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, sweep, more=more)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("slurm.nodes", 2, "stands in slurm, which is the same for all runs"),
        ("sweep.goal", "max", "stands in sweep, which"),
        ("dataset_preprocess.overlap", 1, "changes the data, which no run prepares"),
        ("train_parameters.output_dir", "x", "each run gets a folder of its own"),
        ("train_parameters.optimizer", {}, "is a section; name a key in it"),
        ("dataset", {}, "is a section"),
        ("train_parameters.epoch", 1, "is no key; did you mean train_parameters.epochs?"),
        ("optimizer.lr", 1, "is no key; did you mean train_parameters.optimizer.lr?"),
        ("learning_rate", 1, "is no key; did you mean train_parameters.optimizer.lr?"),
        ("qqq", 1, "is no key; see docs/config.md"),
        ("model.x", 1, "is no key; see docs/config.md"),
        ("train_parameters.optimizer.lr=1", 1, "must be a key such as"),
        ("wandb_config.a b", 1, "must be a key such as"),
        ("wandb_config.", 1, "must be a key such as"),
        (" model", 1, "must be a key such as"),
    ],
)
def test_keys_that_cannot_vary(tmp_path: Path, key: str, value: Any, message: str) -> None:
    (in_grid,) = told(tmp_path, {"grid": {SEED: [1, 2], key: [value]}})
    assert in_grid.startswith(f"c.yaml:10: sweep.grid.{key}: {message}")
    (in_runs,) = told(tmp_path, {"runs": [{SEED: 1}, {key: value}]})
    assert in_runs.startswith(f"c.yaml:6: sweep.runs: run 2: {key}: {message}")


def test_keys_that_clash(tmp_path: Path) -> None:
    lora = "train_parameters.lora_peft_config"
    (line,) = told(tmp_path, {"grid": {lora: [None], f"{lora}.r": [1]}})
    assert f"sweep.grid.{lora}.r: is a part of {lora}, which is given too" in line
    (line,) = told(tmp_path, {"grid": {SEED: [1, 2]}, "runs": [{}, {SEED: 3}]})
    assert f"sweep.runs: run 2: {SEED}: stands in grid, too; keep one" in line
    (line,) = told(tmp_path, {"grid": {lora: [None]}, "runs": [{f"{lora}.r": 1}]})
    assert f"run 1: {lora}.r: is a part of {lora}" in line


def test_every_mistake_of_the_keys_at_once(tmp_path: Path) -> None:
    lines = told(tmp_path, {"grid": {"a": [1], SEED: []}, "runs": [{"b": 1}, {"c": 1}]})
    assert [line.split("; ")[0] for line in lines] == [
        "c.yaml:7: sweep.grid.a: is no key",
        f"c.yaml:9: sweep.grid.{SEED}: is empty",
        "c.yaml:10: sweep.runs: run 1: b: is no key",
        "c.yaml:10: sweep.runs: run 2: c: is no key",
    ]


def test_too_many_runs(tmp_path: Path) -> None:
    largest = {"grid": {SEED: list(range(100)), EPOCHS: list(range(1, 11))}}
    assert len(points(tmp_path, **largest)) == MOST_RUNS
    (line,) = told(tmp_path, {**largest, "runs": [{}, {LR: 1.0}]})
    assert "sweep: makes 2000 runs; must be at most 1000" in line


def test_runs_that_are_the_same_but_written_otherwise(tmp_path: Path) -> None:
    (line,) = told(tmp_path, {"runs": [{SEED: 1}, {}, {SEED: 42}]})
    assert line.endswith(f"two of its runs are the same, {json.dumps({SEED: 42})}; remove one")


def test_a_run_is_checked_like_a_file(tmp_path: Path) -> None:
    """Types, ranges, `None`, rules across keys and secrets; each mistake once, however many runs
    have it."""
    sweep = {
        "grid": {
            SEED: [1, 2],
            "train_parameters.epochs": [1, 0],
            "train_parameters.max_grad_norm": ["1"],
            "dataset.eval_ds": ["None"],
            "train_parameters.precision": ["32-true"],
            "wandb_config.api_key": ["hunter2"],
        },
        "metric": "loss",
    }
    lines = told(tmp_path, sweep, more="  use_mp: true\n" + DATASET)
    found = {line.partition(": sweep.grid.")[2].partition(":")[0]: line for line in lines}
    assert len(lines) == len(found) == 5
    assert "is the number 0, which is out of range" in found["train_parameters.epochs"]
    assert "remove the quotes" in found["train_parameters.max_grad_norm"]
    assert "did you mean null?" in found["dataset.eval_ds"]
    assert "contradicts use_mp: true" in found["train_parameters.precision"]
    assert "is a secret" in found["wandb_config.api_key"]
    assert "hunter2" not in "".join(lines)


def test_two_keys_of_a_run_that_contradict_each_other(tmp_path: Path) -> None:
    sweep = {
        "grid": {
            "train_parameters.shard_group_size": [2],
            "train_parameters.sharding_strategy": ["HYBRID_SHARD", "FULL_SHARD"],
        }
    }
    (line,) = told(tmp_path, sweep)
    assert line.startswith("c.yaml:7: sweep.grid.train_parameters.shard_group_size: ")
    assert line.endswith("train_parameters.sharding_strategy is on line 9")


def test_the_files_own_mistakes_come_first(tmp_path: Path) -> None:
    (line,) = told(tmp_path, {"grid": {SEED: [1, -1]}}, more="  epochs: 0\n")
    assert line.startswith("c.yaml:5: train_parameters.epochs: ")


def test_a_metric_that_nobody_logs(tmp_path: Path) -> None:
    sweep = {"grid": {SEED: [1, 2]}}
    (line,) = told(tmp_path, sweep, more=DATASET)
    assert line.startswith("c.yaml:7: sweep: eval_loss is logged only where there is evaluation")
    (line,) = told(tmp_path, {**sweep, "metric": "eval_loss"}, more=DATASET)
    assert ": sweep.metric: eval_loss is logged only where" in line
    for more in (DATASET + "  eval_ds: x\n", ""):
        assert load(tmp_path, sweep, more=more).sweep
    assert load(tmp_path, {"grid": {"dataset.eval_ds": ["x", "y"]}}, more=DATASET).sweep
    assert load(tmp_path, {**sweep, "metric": "loss"}, more=DATASET).sweep


def test_secrets_of_a_sweep_do_not_leave_the_config() -> None:
    """`load_config` refuses them; this is the second lock."""
    values = yaml.safe_load(BASE)
    values["sweep"] = {
        "grid": {"wandb_config.api_key": ["x"], SEED: [1]},
        "runs": [{"wandb_config.a.password": "x", LR: 1}],
    }
    sweep = config_to_dict(Config.model_validate(values))["sweep"]
    assert sweep["grid"] == {"wandb_config.api_key": "<redacted>", SEED: [1]}
    assert sweep["runs"] == [{"wandb_config.a.password": "<redacted>", LR: 1}]
