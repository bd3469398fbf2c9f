"""`vectorlm check` as it is typed: exit codes, weight, speed; and what `submit` makes of it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.check.project import Project
from vectorlm import cli

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "peft")
MOST_BYTES = 300 << 20
SHIPPED = ["config.yaml", "config_lora.yaml", "config_multinode.yaml", "demo.yaml"]

# Tells which heavy packages it imported, and how much memory it took.
CHECK = rf"""
import re, sys
from vectorlm.cli import main
code = main(["check", *sys.argv[1:]])
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
status = open("/proc/self/status").read()  # its own peak; getrusage counts the parent's, too
print("bytes:", int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "project")
    monkeypatch.setenv("HOME", made.environ["HOME"])
    monkeypatch.setenv("PATH", "/nowhere")
    return made


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir(mode=0o700)


def apart(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", CHECK, "--config", str(project.write())]
    return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_sound(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", str(project.write())]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{project.path}: sound (model {project.model}, full fine-tuning")


def test_errors_with_their_cures(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.train["max_seq_len"] = 16
    project.slurm(setup=["source /away/activate"])
    assert cli.main(["check", "--config", str(project.write())]) == 2
    said = capsys.readouterr().out
    assert "error: dataset.train_ds: was prepared with max_seq_len 8, and the" in said
    assert "\n    -> set it to 8" in said
    assert said.endswith(f"{project.path}: a job with it would fail: 1 error, 1 warning\n")


def test_warnings_alone_are_sound(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.slurm(setup=["source /away/activate"])
    assert cli.main(["check", "--config", str(project.write())]) == 0
    assert f"{project.path}: sound, with 1 warning (" in capsys.readouterr().out


def test_for_programs(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--json", "--config", str(project.write())]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"sound": True, "findings": []}
    assert cli.main([*words, "--set", "model=/away"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] is False
    assert told["findings"][0]["where"] == "model"
    assert cli.main([*words, "--set", "train_parameters.epochs=none"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert "train_parameters.epochs" in told["findings"][0]["text"]


def test_mistakes_in_the_file_and_elsewhere_at_once(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.train["epoch"] = 3
    project.config["model"] = "/away"
    words = ["check", "--config", str(project.write())]
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert told.out.startswith("error: model: there is no folder /away")
    assert "depend on keys that are wrong: the output folder, the fit" in told.out
    assert told.err.startswith(f"{project.path}:")
    assert "train_parameters.epoch: unknown key" in told.err
    assert cli.main([*words, "--json"]) == 2
    wheres = [one["where"] for one in json.loads(capsys.readouterr().out)["findings"]]
    assert wheres == [str(project.path), "model", str(project.path)]


def test_it_is_light_and_quick(project: Project) -> None:
    """Counted in seconds of a core: other work on the machine is not ours."""
    project.train["lora_peft_config"] = {"r": 4}
    project.slurm(gpus_per_node=2, gpu_type="a100")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = apart(project)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "heavy: []" in done.stderr
    assert int(done.stderr.split("bytes:")[1]) < MOST_BYTES
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4


def test_it_is_light_with_the_largest_tokenizers(project: Project) -> None:
    """A vocabulary of a quarter of a million, as Gemma has; no library could take it in 300 MB."""
    content = json.loads((project.model / "tokenizer.json").read_text())
    letters = [chr(97 + i) for i in range(26)] + [chr(0x4E00 + i) for i in range(38)]
    pairs = [a + b for a in letters for b in letters]
    threes = [pair + letter for pair in pairs for letter in letters]
    words = [*content["model"]["vocab"], *letters, *pairs, *threes]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    content["model"]["vocab"] = vocabulary
    content["model"]["merges"] = [[three[:2], three[2]] for three in threes]
    text = json.dumps(content, indent=2)
    assert len(text) > 12 << 20
    (project.model / "tokenizer.json").write_text(text)
    done = apart(project)
    assert f"{len(vocabulary)} tokens, and the model embeddings for 320" in done.stdout
    assert int(done.stderr.split("bytes:")[1]) < MOST_BYTES


# --- the configurations that come with it ---------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_as_they_are(name: str, tmp_path: Path) -> None:
    """Their paths lead nowhere yet; nothing else is wrong with them."""
    command = [sys.executable, "-m", "vectorlm.cli", "check", "--json"]
    done = subprocess.run(
        [*command, "--config", str(ROOT / "configs" / name)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    errors = [one for one in json.loads(done.stdout)["findings"] if one["severity"] == "error"]
    assert {one["where"] for one in errors} <= {
        "model",
        "dataset_preprocess.load_path",
        "dataset_preprocess.eval_load_path",
    }


# --- submit ---------------------------------------------------------------------------------------


def submit(project: Project, *flags: str) -> int:
    return cli.main(["submit", "--config", str(project.write()), *flags])


def test_submit_stops_at_errors(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(str(shutil.which("bash", path="/bin:/usr/bin"))).parent))
    project.slurm()
    project.train["max_seq_len"] = 16
    assert submit(project) == 2
    said = capsys.readouterr().err
    assert "error: dataset.train_ds: was prepared with max_seq_len 8" in said
    assert "not submitted, for the job would fail: 1 error" in said
    assert not project.output.exists()
    assert submit(project, "--dry-run") == 0
    shown = capsys.readouterr()
    assert "error: dataset.train_ds" in shown.err
    assert shown.out.startswith("#!/bin/bash")
