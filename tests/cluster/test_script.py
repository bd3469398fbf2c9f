"""Job scripts are run by a real bash, with recorders in place of srun, scontrol and python."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vectorlm.cluster import script
from vectorlm.cluster.script import render, render_preprocess
from vectorlm.config.keys import all_keys
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, Slurm, SlurmPreprocess, Sweep, TrainParameters
from vectorlm.errors import ClusterError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
LIMIT_S = 60

# Each is `touch canary` to somebody: a shell, sbatch, printf or a glob.
NASTY = [
    "$(touch canary)",
    "`touch canary`",
    "; touch canary",
    "&& touch canary #",
    "| touch canary",
    "' ; touch canary ; '",
    '" ; touch canary ; "',
    "}; touch canary #",
    "x}$(touch canary)",
    "$(<canary)${IFS}touch",
    "x\ntouch canary",
    "x\r\ntouch canary",
    "x\n#SBATCH --output=canary",
    "x --output=canary",
    "x\\\ntouch canary",
    "x\\",
    "x\x00touch canary",
    "x\u2028touch canary",
    "x\x85touch canary",
    "x # touch canary",
    "~/x",
    "*",
    "!!",
    "%s",
    ">canary",
    "<(touch canary)",
    "{touch,canary}",
    "-x",
    "--help",
    "",
    "naïve 🙂",
]

EVERYTHING = Slurm(
    job_name="a.b-c_1",
    partition="gpu,gpu-long",
    account="def-prof_gpu",
    qos="normal",
    nodes=2,
    gpus_per_node=4,
    gpu_type="a100",
    cpus_per_gpu=6,
    mem="120G",
    time="1-12:00:00",
    constraint="[a100|h100]&ib",
    exclude="gpu[03,07-09]",
    reservation="class",
    mail_user="you@example.org",
    signal_lead_s=300,
    requeue=False,
    network_interface="ib0,ib1",
    disable_infiniband=True,
    setup=["module load cuda/12.4", 'export GREETING="a b"'],
    container_image="docker://nvcr.io/nvidia/pytorch:25.01-py3",
    container_mounts=["/scratch", "/host/y:/y:ro"],
    extra_flags=["--exclusive", "--nice=100"],
    extra_gres=["lscratch:100"],
    preprocess=SlurmPreprocess(partition="cpu", cpus=16, mem="64G", time="90"),
)
PYXIS = EVERYTHING.model_copy(update={"container_runtime": "pyxis"})
CPUS = Slurm(gpus_per_node=0, processes_per_node=2, cpus_per_gpu=1)
PATH_NAMES = [
    "my config.yaml",
    "it's.yaml",
    'a"b.yaml',
    "$(touch canary).yaml",
    "`touch canary`.yaml",
    "a;touch canary.yaml",
    "x}$(touch canary).yaml",
    "-x.yaml",
    "--help",
    "*.yaml",
    "~.yaml",
    "#x.yaml",
    "back\\slash.yaml",
    "tab\there.yaml",
    "return\rhere.yaml",
    "bang!!.yaml",
    "%s.yaml",
    "ünïcödé 🙂.yaml",
    "line\u2028separator.yaml",
    os.fsdecode(b"no utf-8 \xff.yaml"),
]


def config_with(
    section: Slurm | None, output_dir: str = "out", at_once: int | None = None
) -> Config:
    return Config(
        model="m",
        train_parameters=TrainParameters(output_dir=output_dir, max_seq_len=8),
        slurm=section,
        sweep=Sweep(grid={"train_parameters.seed": [1, 2]}, at_once=at_once),
    )


def slurm_texts() -> list[str]:
    kinds = ("text", "texts", "choice")
    keys = [key for path, key in all_keys().items() if path[0] == "slurm" and key.kind in kinds]
    return [".".join(key.path[1:]) for key in keys]


# --- the text -------------------------------------------------------------------------------------


def test_examples_are_what_the_renderer_makes_of_their_configurations() -> None:
    assert script.main(["--check"]) == 0


def test_check_finds_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "examples/launch.sh").write_text("#!/bin/bash\n")
    (tmp_path / "examples/launch_lora.sh").chmod(0o644)
    assert script.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "examples/launch.sh: out of date" in said
    assert "examples/launch_lora.sh: out of date" in said  # nobody could run it
    assert "multinode" not in said
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    assert (tmp_path / "examples/launch.sh").read_text() == (
        ROOT / "examples/launch.sh"
    ).read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("everything.sh", render(config_with(EVERYTHING), "configs/my config.yaml")),
        ("sweep.sh", render(config_with(CPUS, at_once=3), "sweep.yaml", tasks=12)),
        ("preprocess.sh", render_preprocess(config_with(PYXIS), "configs/config.yaml")),
    ],
)
def test_golden(name: str, text: str) -> None:
    """WRITE_GOLDEN=1 writes what is rendered now, to be read in the diff."""
    if os.environ.get("WRITE_GOLDEN") == "1":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def every_script() -> dict[str, str]:
    found = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.sh")}
    sections = {"least": Slurm(), "cpus": CPUS, "apptainer": EVERYTHING, "pyxis": PYXIS}
    for name, section in sections.items():
        found[name] = render(config_with(section), "it's mine.yaml")
        found[f"{name} sweep"] = render(config_with(section, "a b", 2), "c.yaml", tasks=1000)
        found[f"{name} data"] = render_preprocess(config_with(section), "c.yaml")
    return found


@pytest.mark.parametrize("name", every_script())
def test_bash_can_read_it(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=every_script()[name], text=True, check=False)
    assert done.returncode == 0


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    for name, text in every_script().items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["shellcheck", *every_script()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_what_is_not_asked_for_is_not_there() -> None:
    text = render(config_with(Slurm(gpus_per_node=0, processes_per_node=1)), "c.yaml")
    for word in ("--gres", "--partition", "--mail", "--array", "NCCL", "GLOO", "apptainer", "None"):
        assert word not in text
    assert "on 1 node with 1 process:" in text


def test_a_section_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: slurm: section is missing"):
        render(config_with(None), "my.yaml")


# --- what bash does with it -----------------------------------------------------------------------

RECORDER = """\
#!/bin/bash
name=${{0##*/}}
if [ "$1" = -c ]; then
    printf '%s' "$IMPORT_ERROR" >&2
    [ -z "$IMPORT_ERROR" ]; exit
fi
kept=()
for variable in {kept}; do
    [ -z "${{!variable+set}}" ] || kept+=("$variable=${{!variable}}")
done
printf '%s\\0' "$name" "$#" "$@" "${{#kept[@]}}" "${{kept[@]}}" >>{record}
case $name in
scontrol) printf 'n7\\nn8\\n' ;;
srun) : >started; sleep "${{SRUN_SLEEPS:-0}}"; exit "${{SRUN_CODE:-0}}" ;;
python) exit "${{PYTHON_CODE:-0}}" ;;
esac
"""
KEPT = (
    "MASTER_ADDR HF_HUB_OFFLINE WANDB_MODE NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_DISABLE "
    "GREETING MARK"
)


@dataclass(frozen=True)
class Call:
    """One call of a program that was recorded."""

    name: str
    words: list[str]
    environment: dict[str, str]


def calls_in(record: bytes) -> Iterator[Call]:
    fields = map(os.fsdecode, record.split(b"\0")[:-1])
    for name in fields:
        words = [next(fields) for _ in range(int(next(fields)))]
        settings = [next(fields).partition("=") for _ in range(int(next(fields)))]
        yield Call(name, words, {key: value for key, _, value in settings})


class Bench:
    """A folder to run scripts in, and a record of every program they call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.record = folder / "record"
        programs = folder / "bin"
        programs.mkdir()
        text = RECORDER.format(kept=KEPT, record=self.record)
        for name in ("srun", "scontrol", "python", "module", "apptainer"):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(folder),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[7-8]",
            "SLURM_CPUS_PER_TASK": "6",
        }

    def start(self, text: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        self.record.write_text("")
        (self.folder.parent / "job.sh").write_bytes(os.fsencode(text))
        return subprocess.Popen(
            ["bash", "../job.sh", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
        )

    def run(
        self, text: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(text, *arguments, **environment)
        out, err = process.communicate(timeout=LIMIT_S)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def all_calls(self) -> list[Call]:
        return list(calls_in(self.record.read_bytes()))

    def calls(self, name: str) -> list[Call]:
        return [call for call in self.all_calls() if call.name == name]

    def names(self) -> list[str]:
        return [call.name for call in self.all_calls()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    (bench.folder / "c.yaml").touch()
    return bench


def test_one_srun_then_conclude(bench: Bench) -> None:
    done = bench.run(render(config_with(Slurm()), "c.yaml"), SRUN_CODE="7", PYTHON_CODE="75")
    assert done.returncode == 75
    assert bench.names() == ["scontrol", "srun", "python"]
    (srun,), (conclude,) = bench.calls("srun"), bench.calls("python")
    flags = ["--export=ALL", "--kill-on-bad-exit=1", "--wait=30", "--cpus-per-task=6"]
    assert srun.words == [*flags, "python", "-m", "vectorlm.train", "--config=c.yaml"]
    assert srun.environment == {
        "MASTER_ADDR": "n7",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    told = ["-m", "vectorlm.conclude", "--config=c.yaml", "--code=7", "--script=../job.sh"]
    assert conclude.words == told


@pytest.mark.parametrize(
    ("environment", "job", "start"),
    [
        ({}, "17", 1),
        ({"SLURM_RESTART_COUNT": "2", "VECTORLM_EARLIER_STARTS": "3"}, "17", 6),
        ({"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "4"}, "16_4", 1),
    ],
)
def test_the_banner_separates_starts(
    environment: dict[str, str], job: str, start: int, bench: Bench
) -> None:
    done = bench.run(render(config_with(Slurm()), "c.yaml"), **environment)
    line = done.stdout.splitlines()[0]
    date = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert re.fullmatch(rf"== vectorlm: job {job}, start {start}, {date}, on n\[7-8\]", line)


def test_everything_reaches_the_processes(bench: Bench) -> None:
    done = bench.run(render(config_with(EVERYTHING), "c.yaml"), WANDB_MODE="online")
    assert (done.returncode, done.stderr) == (0, "")
    (module,), (srun,) = bench.calls("module"), bench.calls("srun")
    assert module.words == ["load", "cuda/12.4"]
    mounts = "/scratch:/scratch,/host/y:/y:ro"
    container = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(bench.folder)]
    command = ["python", "-m", "vectorlm.train", "--config=c.yaml"]
    assert srun.words[4:] == [*container, EVERYTHING.container_image, *command]
    assert srun.environment == {
        "MASTER_ADDR": "n7",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "online",
        "NCCL_SOCKET_IFNAME": "ib0,ib1",
        "GLOO_SOCKET_IFNAME": "ib0,ib1",
        "NCCL_IB_DISABLE": "1",
        "GREETING": "a b",
    }


def test_pyxis_sees_the_folder_of_the_job(bench: Bench) -> None:
    bench.run(render(config_with(PYXIS), "c.yaml"))
    (srun,) = bench.calls("srun")
    assert srun.words[4:7] == [
        f"--container-image={PYXIS.container_image}",
        f"--container-mounts={bench.folder}:{bench.folder},/scratch:/scratch,/host/y:/y:ro",
        f"--container-workdir={bench.folder}",
    ]


def test_preprocessing_takes_no_gpu(bench: Bench) -> None:
    text = render_preprocess(config_with(EVERYTHING), "c.yaml")
    done = bench.run(text, SRUN_CODE="2")
    assert done.returncode == 2
    (srun,) = bench.calls("srun")
    assert srun.words[:3] == ["--export=ALL", "--ntasks=1", "--cpus-per-task=6"]
    assert srun.words[-4:] == ["-m", "vectorlm.cli", "preprocess", "--config=c.yaml"]
    assert "--nv" not in srun.words
    assert "gres" not in text
    assert bench.calls("python") == []


def test_a_task_of_a_sweep_takes_its_own_configuration(bench: Bench) -> None:
    text = render(config_with(Slurm(), "my sweep"), "c.yaml", tasks=8)
    for number in ("000", "007"):
        (bench.folder / "my sweep" / number).mkdir(parents=True)
        (bench.folder / "my sweep" / number / "config.yaml").touch()
    bench.run(text, SLURM_ARRAY_TASK_ID="7")
    assert bench.calls("srun")[0].words[-1] == "--config=my sweep/007/config.yaml"
    # As a continuation of one task names it.
    bench.run(text, "my sweep/000/config.yaml", SLURM_ARRAY_TASK_ID="7")
    assert bench.calls("srun")[0].words[-1] == "--config=my sweep/000/config.yaml"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["absent.yaml"], {}, "absent.yaml: no such file in "),
        (
            [],
            {"IMPORT_ERROR": "Traceback:\nModuleNotFoundError: x"},
            "here (ModuleNotFoundError: x)",
        ),
        ([], {"SLURM_JOB_ID": ""}, "this is a job script; submit it"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    arguments: list[str], environment: dict[str, str], said: str, bench: Bench
) -> None:
    done = bench.run(render(config_with(Slurm()), "c.yaml"), *arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert bench.names() == []


@pytest.mark.parametrize(
    ("environment", "mark"),
    [
        ({}, "here"),
        ({"CONDA_DEFAULT_ENV": "base"}, "here"),
        ({"CONDA_DEFAULT_ENV": "mine"}, None),
        ({"VIRTUAL_ENV": "/elsewhere"}, None),
    ],
)
def test_the_environment_of_the_submitting_shell_comes_first(
    environment: dict[str, str], mark: str | None, bench: Bench
) -> None:
    (bench.folder / ".venv/bin").mkdir(parents=True)
    (bench.folder / ".venv/bin/activate").write_text("export MARK=here\n")
    bench.run(render(config_with(Slurm()), "c.yaml"), **environment)
    assert bench.calls("srun")[0].environment.get("MARK") == mark


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_the_shell_outlives_a_signal(number: signal.Signals, bench: Bench) -> None:
    text = render(config_with(Slurm()), "c.yaml")
    process = bench.start(text, SRUN_SLEEPS="0.5", SRUN_CODE="9", PYTHON_CODE="3")
    while not (bench.folder / "started").exists():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3
    assert "--code=9" in bench.calls("python")[0].words


# --- injection ------------------------------------------------------------------------------------


RENDERERS = (render, render_preprocess)


def forced(name: str, value: str) -> Config:
    """A configuration as no file can make one: nothing has looked at this value."""
    key, inner = name.partition(".")[::2]
    if inner:
        changed: object = SlurmPreprocess().model_copy(update={inner: value})
    else:
        changed = [value] if isinstance(getattr(EVERYTHING, key), list) else value
    return config_with(EVERYTHING.model_copy(update={key: changed}))


def rendered(make: Callable[[], str]) -> str | None:
    try:
        return make()
    except ClusterError:
        return None


def requests_are_plain(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    return all(re.fullmatch(r"#SBATCH --[a-z-]+(=[!-~]+)?", line) for line in lines)


@pytest.mark.parametrize("name", [name for name in slurm_texts() if name != "setup"])
def test_no_value_becomes_a_command(name: str, bench: Bench) -> None:
    """`setup` is made of commands; what can be asked of it is below."""
    untouched = {make(config_with(EVERYTHING), "c.yaml") for make in RENDERERS}
    for value in NASTY:
        for make in RENDERERS:
            text = rendered(lambda make=make, value=value: make(forced(name, value), "c.yaml"))
            if text is None or text in untouched:
                continue
            assert requests_are_plain(text), value
            bench.run(text)
            assert set(bench.names()) <= {"scontrol", "srun", "python", "module"}, value
            assert bench.names().count("srun") == 1, value
            assert not list(bench.folder.glob("*canary*")), value


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_values_that_a_shell_sees_arrive_as_they_are(runtime: str, bench: Bench) -> None:
    for value in NASTY:
        if not value or set(value) & {"\n", "\0"}:
            continue
        names = ("container_image", "network_interface")
        changes = {"container_runtime": runtime, **dict.fromkeys(names, value)}
        bench.run(render(config_with(EVERYTHING.model_copy(update=changes)), "c.yaml"))
        (srun,) = bench.calls("srun")
        assert value in srun.words or f"--container-image={value}" in srun.words
        assert srun.environment["NCCL_SOCKET_IFNAME"] == value


@pytest.mark.parametrize("value", ["x\ny", "x\ry", "x\x00y", "x\x1by", "x\x85y", "x\u2028y"])
def test_a_setup_line_is_one_line(value: str) -> None:
    with pytest.raises(ClusterError, match=r"slurm\.setup: .* holds a control character"):
        render(forced("setup", value), "c.yaml")


@pytest.mark.parametrize("value", [value for value in NASTY if value and value != "-x"])
def test_sbatch_is_given_plain_words(value: str) -> None:
    if re.fullmatch(r"[\w*%.-]+", value, re.ASCII):
        return
    with pytest.raises(ClusterError, match="cannot be written into a job script"):
        render(forced("account", value), "c.yaml")


@pytest.mark.parametrize("name", PATH_NAMES)
def test_a_configuration_may_be_named_anything(name: str, bench: Bench) -> None:
    (bench.folder / name).touch()
    files = set(os.listdir(bench.folder))
    default = render(config_with(Slurm()), name, name=name)
    given = render(config_with(Slurm()), "c.yaml")
    for text, arguments in ((default, []), (given, [name])):
        done = bench.run(text, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert bench.calls("srun")[0].words[-1] == f"--config={name}"
        assert f"--config={name}" in bench.calls("python")[0].words
        assert set(os.listdir(bench.folder)) - files <= {"started"}


@pytest.mark.parametrize("name", PATH_NAMES[:-1])  # YAML cannot hold the last one
def test_the_folder_of_a_sweep_may_be_named_anything(name: str, bench: Bench) -> None:
    (bench.folder / name / "003").mkdir(parents=True)
    (bench.folder / name / "003/config.yaml").touch()
    bench.run(render(config_with(Slurm(), name), "c.yaml", tasks=4), SLURM_ARRAY_TASK_ID="3")
    assert bench.calls("srun")[0].words[-1] == f"--config={name}/003/config.yaml"
    assert not list(bench.folder.glob("canary"))


@pytest.mark.parametrize("name", ["a\nb.yaml", "a\n#SBATCH --wrap=x", "a\0b"])
def test_a_line_break_in_a_path_is_refused(name: str) -> None:
    for make in (
        lambda: render(config_with(Slurm()), name),
        lambda: render(config_with(Slurm()), "c.yaml", name=name),
        lambda: render(config_with(Slurm(), name), "c.yaml", tasks=1),
        lambda: render_preprocess(config_with(Slurm()), name),
    ):
        with pytest.raises(ClusterError, match="holds a line break"):
            make()


@pytest.mark.parametrize("path", [*script.EXAMPLES.values(), "configs/demo.yaml"])
def test_shipped_configurations_render(path: str) -> None:
    assert render(load_config(ROOT / path), path).startswith("#!/bin/bash\n")
