"""The console command: exit codes, no tracebacks, quick and light where no model is needed."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project
from vectorlm import __version__, cli
from vectorlm.config.schema import Config
from vectorlm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/config.yaml")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def check_apart(path: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "vectorlm.cli", "check", "--config", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_mistakes_go_to_stderr_without_traceback(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: 1\nx: 2\ntrain_parameters: {output_dir: o, max_seq_len: 8}\n")
    done = check_apart(path)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(f"{path}:1: model: is the number 1")
    assert second.startswith(f"{path}:2: x: unknown key")


@pytest.mark.parametrize("flag", ["--config", "--config_path", "--yaml_path"])
def test_config_under_all_its_names(
    flag: str, capsys: pytest.CaptureFixture[str], project: Project
) -> None:
    path = str(project.write())
    assert cli.main(["check", flag, path, "--set", "train_parameters.epochs=7"]) == 0
    assert "7 epochs" in capsys.readouterr().out


def test_default_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project: Project
) -> None:
    project.path = project.folder / "configs/config.yaml"
    project.path.parent.mkdir()
    project.write()
    monkeypatch.chdir(project.folder)
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out.startswith("configs/config.yaml: sound")


def test_check_says_what_is_not_there(capsys: pytest.CaptureFixture[str], project: Project) -> None:
    del project.config["dataset"]
    assert cli.main(["check", "--config", str(project.write())]) == 0
    assert "no dataset: only for preprocessing" in capsys.readouterr().out


CHOICES = {"data": ["inspect"]}  # verbs that take a word more


@pytest.mark.parametrize(
    ("words", "who", "said"),
    [
        ([], "vectorlm", "required: VERB"),
        (["trian"], "vectorlm", "invalid choice: 'trian'"),
        (["train", "--nproc-per-node", "0"], "vectorlm train", "at least 1"),
        (["plan", "--apply"], "vectorlm plan", "expected one argument"),
        *(
            [
                [verb, *CHOICES.get(verb, []), "--nope"],
                f"vectorlm {verb}",
                "unrecognized arguments: --nope",
            ]
            for verb in cli.VERBS
        ),
        (["convert", "--nope"], "vectorlm convert", "unrecognized arguments: --nope"),
    ],
    ids=str,
)
def test_wrong_words_are_told_in_three_lines(
    words: list[str], who: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    error, usage, more = captured.err.splitlines()
    assert error.startswith(f"{who}: ")
    assert said in error
    assert usage.startswith(f"usage: {who} ")
    assert more == f"{who} --help tells more"
    assert not captured.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vectorlm {__version__}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for verb in ("check", "preprocess", "train", "convert"):
        assert f"    {verb}" in shown


def test_run_door(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise DataError("row 3 is empty")

    def interrupted() -> int:
        raise KeyboardInterrupt

    def broken() -> int:
        raise ZeroDivisionError

    assert cli.run_door(lambda: 75) == 75
    assert cli.run_door(lambda: None) == 0
    assert cli.run_door(fails) == 2
    assert capsys.readouterr().err == "row 3 is empty\n"
    assert cli.run_door(interrupted) == 130
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        cli.run_door(broken)


# --- what each verb hands on, with the doors replaced ---------------------------------------------


def door(monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any) -> list[Any]:
    calls: list[Any] = []
    replaced = types.ModuleType(module)

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return result

    setattr(replaced, name, record)
    monkeypatch.setitem(sys.modules, module, replaced)
    return calls


def test_preprocess(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = door(monkeypatch, "vectorlm.preprocess", "prepare_config", ["a manifest"])
    assert cli.main(["preprocess", "--config", CONFIG, "--set", "model=m"]) == 0
    ((config,),) = calls
    assert isinstance(config, Config)
    assert config.model == "m"


def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = door(monkeypatch, "vectorlm.launch", "launch", 75)
    assert (
        cli.main(["train", "--config", CONFIG, "--set", "model=m", "--nproc-per-node", "2"]) == 75
    )
    assert cli.main(["train", "--config", CONFIG]) == 75
    assert calls == [(CONFIG, ["model=m"], 2), (CONFIG, [], None)]


def test_convert_gets_the_remaining_words(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = door(monkeypatch, "vectorlm.utils.convert_to_hf", "main", 0)
    assert cli.main(["convert", "--config", CONFIG, "--merge"]) == 0
    assert calls == [(["--config", CONFIG, "--merge"],)]


@pytest.mark.parametrize(
    ("verb", "section"), [("preprocess", "dataset_preprocess"), ("train", "dataset")]
)
def test_a_verb_needs_its_section(
    verb: str,
    section: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = door(monkeypatch, "vectorlm.preprocess", "prepare_config", [])
    calls += door(monkeypatch, "vectorlm.launch", "launch", 0)
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ntrain_parameters: {output_dir: o, max_seq_len: 8}\n")
    assert cli.main([verb, "--config", str(path)]) == 2
    assert f"{path}: {section}: section is missing" in capsys.readouterr().err
    assert calls == []
