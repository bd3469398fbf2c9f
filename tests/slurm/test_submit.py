"""`vectorlm submit` against a real Slurm: what it holds, what it refuses, and what comes of it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ModelFolder
from tests.slurm.lab import Lab
from vectorlm.cluster.journal import past_starts
from vectorlm.config.load import load_config

TEXTS = ["The quick brown fox jumps over the lazy dog near the river."] * 12
HELD = 'slurm.extra_flags=["--hold"]'


class Project:
    """A user's folder on the cluster, with a configuration, data and a tiny model."""

    def __init__(self, lab: Lab, folder: Path, model: Path) -> None:
        self.lab, self.folder = lab, folder
        self.folder.mkdir()
        shutil.copytree(model, folder / "model")
        rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        (folder / "raw.jsonl").write_text(rows)
        self.config = "my config.yaml"
        self.write()

    def write(self, **changes: Any) -> None:
        content = {
            "model": "model",
            "train_parameters": {"output_dir": "out", "max_seq_len": 32},
            "dataset": {"train_ds": "rows"},
            "dataset_preprocess": {
                "load_path": "raw.jsonl",
                "save_path": "rows",
                "packing_type": "full",
            },
            "slurm": {
                "gpus_per_node": 0,
                "processes_per_node": 2,
                "cpus_per_gpu": 1,
                "mem": "2G",
                "time": 10,
                "preprocess": {"cpus": 2, "mem": "2G"},
            },
        }
        (self.folder / self.config).write_text(yaml.safe_dump({**content, **changes}))

    def vectorlm(self, verb: str, *flags: str, check: bool = True) -> tuple[int, str]:
        command = ["vectorlm", verb, "--config", self.config, *flags]
        done = self.lab.run(*command, cwd=self.folder, check=check, limit_s=90)
        return done.returncode, done.stdout + done.stderr

    def submit(self, *overrides: str, flags: tuple[str, ...] = ()) -> str:
        """The id of the job that trains."""
        said = self.vectorlm("submit", *flags, *(f"--set={text}" for text in overrides))[1]
        found = re.search(r"^Job (\d+) trains", said, re.M)
        assert found, said
        return found[1]

    def refused(self, *overrides: str, flags: tuple[str, ...] = ()) -> str:
        """Why."""
        before = self.lab.queue()
        sets = [f"--set={text}" for text in overrides]
        code, said = self.vectorlm("submit", *flags, *sets, check=False)
        assert code == 2
        assert "Traceback" not in said
        assert self.lab.queue() == before
        return said

    def noted(self) -> dict[str, Any]:
        folder = Path(self.lab.env["XDG_STATE_HOME"]) / "vectorlm/jobs"
        facts = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        return {
            job: fact
            for job, fact in facts.items()
            if Path(fact["output_dir"]).is_relative_to(self.folder)
        }


@pytest.fixture
def project(slurm: Lab, tmp_path: Path, model_folder: ModelFolder) -> Project:
    return Project(slurm, tmp_path / "project", model_folder("llama"))


def test_what_is_printed_is_what_slurm_holds(project: Project) -> None:
    nasty = ["model=x\n#SBATCH --wrap=touch canary", "wandb_config.a=$(touch canary)"]
    sets = [f"--set={text}" for text in (HELD, *nasty)]
    command = ["vectorlm", "submit", "--config", project.config, "--dry-run", *sets]
    printed = project.lab.run(*command, cwd=project.folder).stdout
    job = project.submit(HELD, *nasty, flags=("--force",))
    assert project.lab.run("scontrol", "write", "batch_script", job, "-").stdout.strip() == (
        printed.strip()
    )
    facts = project.lab.run("scontrol", "show", "job", job).stdout
    frozen = project.folder / "out/submitted/0001/config.yaml"
    staged = "out/submitted/0001"
    assert f"Command={project.folder}/{staged}/job.sh {staged}/config.yaml" in facts
    assert f"WorkDir={project.folder}" in facts
    assert f"StdOut={project.folder}/out/logs/vectorlm-{job}.log" in facts
    given = project.folder / project.config
    assert load_config(frozen) == load_config(given, [HELD, *nasty])
    for path in (frozen.parent, frozen, frozen.parent / "job.sh", project.folder / "out/logs"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    noted = project.noted()[job]
    assert noted["output_dir"] == str(project.folder / "out")
    assert noted["log"] == f"{project.folder}/out/logs/vectorlm-{job}.log"


def test_every_request_reaches_slurm(project: Project) -> None:
    project.write(
        slurm={
            "job_name": "a.b-c_1",
            "partition": "a100,grace",
            "account": "def-prof_gpu",
            "nodes": 1,
            "gpus_per_node": 2,
            "gpu_type": "a100",
            "cpus_per_gpu": 3,
            "mem": "3000M",
            "time": "1-02:03:00",
            "exclude": "n[2]",
            "mail_user": "you@example.org",
            "mail_type": "END,FAIL",
            "requeue": False,
            "extra_flags": ["--hold", "--nice=100", "--comment=a=b"],
            "extra_gres": ["lscratch:100"],
        }
    )
    facts = project.lab.fields(project.submit())
    expected = {
        "JobName": "a.b-c_1",
        "Partition": "a100,grace",
        "Account": "def-prof_gpu",
        "NumNodes": "1-1",
        "NumTasks": "2",
        "ExcNodeList": "n2",
        "CPUs/Task": "3",
        "MinMemoryNode": "3000M",
        "TimeLimit": "1-02:03:00",
        "TresPerNode": "gres:gpu:a100:2,gres:lscratch:100",
        "MailUser": "you@example.org",
        "MailType": "END,FAIL",
        "Requeue": "0",
        "Comment": "a=b",
        "NtasksPerN:B:S:C": "2:0:*:*",
    }
    assert {name: facts.get(name) for name in expected} == expected
    assert facts["Nice"] == "100"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slurm.partition=nope", "nope.*\nchange slurm.partition; there is: a100; .*urgent"),
        ("slurm.constraint=v100", "Invalid feature.*\nchange slurm.constraint"),
        ("slurm.reservation=nope", "reservation is invalid\nchange slurm.reservation"),
        ("slurm.exclude=zzz", "Invalid node name.*\nchange slurm.exclude; there is: n1; n2"),
        ("slurm.mem=900G", "Memory.*\nchange slurm.mem; there is: a100: 2 node.s. of 8 CPUs"),
        ('slurm.extra_flags=["--fly"]', "unrecognized option '--fly'\nchange slurm.extra_flags"),
        ('slurm.extra_flags=["--licenses=x:1"]', "license.*\nchange slurm.extra_flags"),
    ],
)
def test_refusals_name_the_key_and_the_choice(project: Project, override: str, said: str) -> None:
    found = project.refused(override, flags=("--force",))  # check would have known
    assert re.search("sbatch refused the job: .*" + said, found), found
    assert list((project.folder / "out/submitted").iterdir()) == []
    assert project.noted() == {}


def test_a_job_that_cannot_start_is_told(project: Project) -> None:
    said = project.vectorlm("submit", "--force", "--set=slurm.nodes=5")[1]
    assert re.search(r"But it cannot start: .*scancel \d+, and change the keys of slurm", said)
    assert "There is no prepared data in rows yet" in said


def test_a_folder_takes_one_job_at_a_time(project: Project) -> None:
    job = project.submit(HELD)
    assert f"out: job {job} (PENDING) works in it" in project.refused()
    assert "works in it" in project.refused("train_parameters.output_dir=../project/out")
    other = project.submit(HELD, "train_parameters.output_dir=other")
    project.lab.cancel(job)
    project.lab.wait(job)
    assert project.submit(HELD) not in (job, other)
    assert sorted(path.name for path in (project.folder / "out/submitted").iterdir()) == [
        "0001",
        "0002",
    ]


def test_odd_folders(project: Project) -> None:
    odd = "it's 100%j [x] $(touch canary)"
    job = project.submit(f"train_parameters.output_dir={odd}")
    log = project.folder / odd / f"logs/vectorlm-{job}.log"
    project.lab.until(lambda: log.exists() and "== vectorlm" in log.read_text(), "a log", 30, job)
    assert project.noted()[job]["log"] == str(log)
    assert not (project.folder / "canary").exists()


def test_a_sweep_is_an_array(project: Project) -> None:
    grid = {"train_parameters.optimizer.lr": [1e-3, 2e-3], "train_parameters.seed": [1, 2]}
    project.write(sweep={"grid": grid, "metric": "loss", "at_once": 2})
    said = project.vectorlm("submit", f"--set={HELD}")[1]
    job = re.search(r"^Job (\d+) trains 4 runs, as", said, re.M)
    assert job, said
    assert re.search(r"^out/002 +0.002 +1$", said, re.M), said
    facts = project.lab.fields(job[1])
    assert (facts["ArrayTaskId"], facts["ArrayTaskThrottle"]) == ("0-3%2", "2")
    runs = {f"{job[1]}_{n}": f"out/{n:03d}" for n in range(4)}
    noted = {id: Path(fact["output_dir"]) for id, fact in project.noted().items()}
    expected = {id: project.folder / path for id, path in runs.items()}
    assert noted == {job[1]: project.folder / "out", **expected}
    for path in runs.values():
        config = load_config(project.folder / path / "config.yaml")
        assert config.sweep is None
        assert config.train_parameters.output_dir == path
    assert f"job {job[1]}" in project.refused()
    project.lab.cancel(job[1])
    project.lab.until(lambda: job[1] not in str(project.lab.queue()), "end of the array", 30)
    (project.folder / "out/002/starts").mkdir()  # as if this one had begun
    said = project.refused("train_parameters.epochs=9")
    assert "out/002/config.yaml: belongs to a run with other settings (train_parameters)" in said
    again = project.submit(HELD)
    assert again != job[1]
    project.lab.cancel(again)


def test_prepare_then_train(project: Project) -> None:
    """From raw text to a trained model with one command; a second time, nothing is prepared."""
    said = project.vectorlm("submit", "--with-preprocess")[1]
    first, then = (re.search(rf"^Job (\d+) {verb}", said, re.M) for verb in ("prepares", "trains"))
    assert first
    assert then, said
    assert project.lab.fields(then[1])["Dependency"] == f"afterok:{first[1]}(unfulfilled)"
    assert project.lab.wait(first[1], limit_s=120) == "COMPLETED"
    assert "documents  12" in project.lab.log(first[1])
    assert project.lab.wait(then[1], limit_s=180) == "COMPLETED", project.lab.account(then[1])
    log = project.lab.log(then[1])
    assert log.startswith(f"== vectorlm: job {then[1]}, start 1, ")
    assert "finished: out/final-model" in log
    (start,) = past_starts(project.folder / "out")
    assert (start.start.job, start.end and start.end.outcome) == (then[1], "finished")

    said = project.vectorlm("submit", "--with-preprocess", f"--set={HELD}")[1]
    assert "up to date: no preprocessing job is needed" in said
    assert "prepares" not in said


def test_without_data_training_never_starts(project: Project) -> None:
    (project.folder / "raw.jsonl").unlink()
    said = project.vectorlm("submit", "--with-preprocess", "--force")[1]
    first, then = re.findall(r"^Job (\d+)", said, re.M)
    assert project.lab.wait(first) == "FAILED"
    assert "load_path: there is no file or folder raw.jsonl" in project.lab.log(first)
    assert project.lab.wait(then) == "CANCELLED"
    assert not (project.folder / "out/starts").exists()


def test_when_training_is_refused_nothing_is_prepared(project: Project) -> None:
    before = set(project.noted())
    said = project.refused("slurm.partition=nope", flags=("--with-preprocess", "--force"))
    assert "change slurm.partition" in said
    assert set(project.noted()) == before


def test_in_the_queue_the_configuration_does_not_change(project: Project) -> None:
    job = project.submit(HELD)
    project.write(model="another")
    frozen = subprocess.run(
        ["tail", "-n", "+2", project.folder / "out/submitted/0001/config.yaml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert yaml.safe_load(frozen)["model"] == "model"
    assert project.lab.state(job) == "PENDING"
