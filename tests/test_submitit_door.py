"""The section `slurm` as submitit is given it; with a real Slurm: tests/slurm/test_submitit.py."""

from __future__ import annotations

import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import submitit
import yaml
from submitit.core.utils import FailedJobError

from vectorlm import cli
from vectorlm.cluster.submit import Plan, make_plan
from vectorlm.config.schema import Slurm
from vectorlm.errors import ClusterError
from vectorlm.submitit_door import _Executor, with_submitit
from vectorlm.submitit_job import TrainingJob

PYTHON = f"{shlex.quote(sys.executable)} -m vectorlm.stop -u -m submitit.core._submit"
GRID = {"train_parameters.seed": [1, 2, 3]}

# For every key: other values than the defaults, and what they make of the script.
KEYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "job_name": ({"job_name": "a.b-c_1"}, ["#SBATCH --job-name=a.b-c_1\n"]),
    "partition": ({"partition": "gpu,gpu-long"}, ["#SBATCH --partition=gpu,gpu-long\n"]),
    "account": ({"account": "def-prof_gpu"}, ["#SBATCH --account=def-prof_gpu\n"]),
    "qos": ({"qos": "normal"}, ["#SBATCH --qos=normal\n"]),
    "nodes": ({"nodes": 2}, ["#SBATCH --nodes=2\n"]),
    "gpus_per_node": (
        {"gpus_per_node": 4},
        ["#SBATCH --gres=gpu:4\n", "#SBATCH --ntasks-per-node=4\n"],
    ),
    "gpu_type": ({"gpu_type": "a100"}, ["#SBATCH --gres=gpu:a100:1\n"]),
    "processes_per_node": (
        {"processes_per_node": 3, "gpus_per_node": 0},
        ["#SBATCH --ntasks-per-node=3\n"],
    ),
    "cpus_per_gpu": ({"cpus_per_gpu": 6}, ["#SBATCH --cpus-per-task=6\n"]),
    "mem": ({"mem": "120G"}, ["#SBATCH --mem=120G\n"]),
    "time": ({"time": "1-12:00:30"}, ["#SBATCH --time=2161\n"]),
    "constraint": ({"constraint": "[a100|h100]&ib"}, ["#SBATCH --constraint='[a100|h100]&ib'\n"]),
    "exclude": ({"exclude": "gpu[03,07-09]"}, ["#SBATCH --exclude='gpu[03,07-09]'\n"]),
    "reservation": ({"reservation": "class"}, ["#SBATCH --reservation=class\n"]),
    "mail_user": (
        {"mail_user": "you@example.org"},
        ["#SBATCH --mail-user=you@example.org\n", "#SBATCH --mail-type=END,FAIL\n"],
    ),
    "mail_type": (
        {"mail_type": "ALL", "mail_user": "you@example.org"},
        ["#SBATCH --mail-type=ALL\n"],
    ),
    "signal_lead_s": ({"signal_lead_s": 300}, ["#SBATCH --signal=USR2@300\n"]),
    "requeue": ({"requeue": False}, ["#SBATCH --no-requeue\n"]),
    "network_interface": (
        {"network_interface": "ib0"},
        ["\nexport NCCL_SOCKET_IFNAME=ib0\n", "\nexport GLOO_SOCKET_IFNAME=ib0\n"],
    ),
    "disable_infiniband": ({"disable_infiniband": True}, ["\nexport NCCL_IB_DISABLE=1\n"]),
    "setup": ({"setup": ["module load cuda", 'A="b c"']}, ['\nmodule load cuda\nA="b c"\n']),
    "container_image": (
        {"container_image": "/x.sif"},
        [' apptainer exec --nv --pwd "$PWD" /x.sif python -m vectorlm.stop -u -m submitit.core.'],
    ),
    "container_runtime": (
        {"container_image": "x", "container_runtime": "pyxis"},
        [' --container-image=x --container-mounts="$PWD:$PWD" --container-workdir="$PWD" python '],
    ),
    "container_mounts": (
        {"container_image": "/x.sif", "container_mounts": ["/a", "/b:/c:ro"]},
        [" --bind /a:/a,/b:/c:ro "],
    ),
    "extra_flags": (
        {"extra_flags": ["--exclusive", "--nice=100"]},
        ["#SBATCH --exclusive\n", "#SBATCH --nice=100\n"],
    ),
    "extra_gres": ({"extra_gres": ["lscratch:100"]}, ["#SBATCH --gres=gpu:1,lscratch:100\n"]),
}
NOT_IN_THE_SCRIPT = {"launcher", "max_requeues", "node_gbit_per_s", "preprocess"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(slurm: dict[str, Any], output_dir: str = "out", **sections: Any) -> Plan:
    content = {
        "model": "m",
        "train_parameters": {"output_dir": output_dir, "max_seq_len": 8},
        "dataset": {"train_ds": "rows"},
        "slurm": {"launcher": "submitit", **slurm},
        **sections,
    }
    Path("c.yaml").write_text(yaml.safe_dump(content))
    return make_plan("c.yaml", [])


def script(slurm: dict[str, Any], **sections: Any) -> str:
    return with_submitit(plan(slurm, **sections)).script


# --- the section ----------------------------------------------------------------------------------


def test_no_key_is_forgotten() -> None:
    assert KEYS.keys() | NOT_IN_THE_SCRIPT == Slurm.model_fields.keys()


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_the_script(key: str) -> None:
    values, expected = KEYS[key]
    assert key in values
    text, default = script(values), script({})
    for part in expected:
        assert part in text
        assert part not in default


def test_max_requeues_is_how_often_submitit_goes_on() -> None:
    assert _Executor(plan({"max_requeues": 7}), Path("x")).max_num_timeout == 7


def test_the_processes_are_started_as_by_our_own_script() -> None:
    text = script({})
    (srun,) = [line for line in text.splitlines() if line.startswith("srun ")]
    folder = Path("out/submitted/NNNN/submitit").absolute()
    assert srun == (
        f"srun --unbuffered --output {folder}/%j_%t_log.out --export=ALL --kill-on-bad-exit=1 "
        f'--wait=30 --cpus-per-task="$SLURM_CPUS_PER_TASK" {PYTHON} {folder}'
    )
    for line in ("trap : TERM INT USR1 USR2", "export MASTER_ADDR", "export HF_HUB_OFFLINE=1 "):
        assert f"\n{line}" in text
    assert text.index('echo "== vectorlm: job $job, start $start') < text.index(srun)
    assert "#SBATCH --requeue\n" in text
    assert "wckey" not in text


def test_bash_can_read_it() -> None:
    everything = {name: value for values, _ in KEYS.values() for name, value in values.items()}
    del everything["processes_per_node"]
    for runtime in ("apptainer", "pyxis"):
        text = script({**everything, "gpus_per_node": 2, "container_runtime": runtime})
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_sweep_is_an_array_and_one_run_is_none() -> None:
    sweep = {"grid": GRID, "metric": "loss"}
    assert "#SBATCH --array=0-2%3\n" in script({}, sweep=sweep)
    assert "#SBATCH --array=0-2%2\n" in script({}, sweep={**sweep, "at_once": 2})
    alone = script({}, sweep={"runs": [{"train_parameters.seed": 1}], "metric": "loss"})
    assert "--array" not in alone


def test_a_job_may_wait_for_another() -> None:
    text = _Executor(plan({}), Path("x"), earlier="17").text(0)
    assert "#SBATCH --dependency=afterok:17\n#" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text


@pytest.mark.parametrize(
    "folder", ["100%j", "%", "x\ntouch canary", "x\r", "x\u2028y", "x\ty", "x\x85y"]
)
def test_folders_that_would_be_read_as_something_else(folder: str) -> None:
    with pytest.raises(ClusterError, match="submitit cannot work in this folder"):
        with_submitit(plan({}, output_dir=folder))


@pytest.mark.parametrize("folder", ["a b", "it's", 'a"b', "$(touch canary)", "`touch canary`;#"])
def test_odd_folders_are_no_commands(folder: str) -> None:
    text = with_submitit(plan({}, output_dir=folder)).script
    bash = f"srun() {{ :; }}; scontrol() {{ :; }}\n{text}"
    subprocess.run(["bash"], input=bash, text=True, check=True, capture_output=True, timeout=30)
    assert not Path("canary").exists()
    assert str(Path(folder).absolute()) in " ".join(shlex.split(text, comments=True))


def test_values_that_no_script_can_hold() -> None:
    """The schema admits none of them; the second lock holds without it."""
    sound = plan({})
    for name in ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem"):
        section = sound.section.model_copy(update={name: "x\ntouch canary"})
        bad = sound.config.model_copy(update={"slurm": section})
        with pytest.raises(ClusterError, match="cannot be written into a job script"):
            with_submitit(Plan(bad, "c.yaml", (), (), "", None))


# --- the verb -------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_submitit_would_submit(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    expected = script({"nodes": 2})
    programs = tmp_path_factory.mktemp("bin")
    (programs / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(programs))  # no Slurm is needed
    assert cli.main(["submit", "--config", "c.yaml", "--dry-run"]) == 0
    assert capfd.readouterr().out == expected
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


def test_submitit_is_imported_only_when_asked_for() -> None:
    plan({"launcher": "sbatch"})
    code = (
        "import sys; sys.modules['submitit'] = None\nfrom vectorlm.cli import main\n"
        "sys.exit(main(['submit', '--dry-run', '--config', 'c.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# --- the job --------------------------------------------------------------------------------------


def test_what_is_pickled_is_a_path() -> None:
    job = TrainingJob("c.yaml")
    data = cloudpickle.dumps(job.checkpoint())
    assert len(data) < 500
    again = pickle.loads(data)
    assert (again.function, again.args, again.kwargs) == (job, (), {})


def test_a_mistake_arrives_at_the_result(tmp_path: Path) -> None:
    """submitit's executor for this machine, which runs the job as the one for Slurm does."""
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(TrainingJob(str(tmp_path / "absent.yaml")))
    with pytest.raises(FailedJobError, match=r"absent\.yaml: no such file"):
        job.result()


def test_signals_are_held_until_a_flag_is_armed() -> None:
    code = (
        "import os, signal; [os.kill(os.getpid(), s) for s in (10, 12, 15)]\n"
        "import sys; from vectorlm.stop import StopFlag; stop = StopFlag(); stop.arm()\n"
        "print(sys.argv[1:], bool(stop))"
    )
    command = [sys.executable, "-m", "vectorlm.stop", "-c", code, "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['a b'] True\n")
