"""The section `slurm` -> the text of a job script. Floor 1.

`render` is pure: `vectorlm submit` prints or submits what it returns, and the scripts in examples/
are what it returns for the shipped configurations (`python -m vectorlm.cluster.script` writes them,
`--check` only says whether they are up to date).

What a shell sees is quoted, and what sbatch sees must be one plain word, although the schema admits
nothing else: two locks, for a value that slips through one becomes a command.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from vectorlm.config.job_text import FLAG
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, Slurm
from vectorlm.errors import ClusterError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python -m vectorlm.cluster.script"
EXAMPLES = {
    "examples/launch.sh": "configs/config.yaml",
    "examples/launch_multinode.sh": "configs/config_multinode.yaml",
    "examples/launch_lora.sh": "configs/config_lora.yaml",
}
FLAGS = ("--export=ALL", "--kill-on-bad-exit=1", "--wait=30")
POINT_NAME = "%03d"  # the folder of a sweep's run, for the shell's printf and for Python
_WORD = re.compile(r"[A-Za-z0-9_.,:/@%+*\[\]()&|=-]+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def render(config: Config, config_path: str, name: str = "job.sh", tasks: int | None = None) -> str:
    """The script that trains; with `tasks`, the one of an array with so many of them."""
    section = slurm_section(config, config_path)
    at_once = config.sweep.at_once if config.sweep and tasks else None
    output_dir = config.train_parameters.output_dir
    parts = [
        _head(_purpose(section, tasks), name, output_dir if tasks else config_path, bool(tasks)),
        _requests(section, tasks, at_once),
        _one_config(config_path) if tasks is None else _task_config(output_dir),
        _IN_A_JOB,
        _BEGIN,
        _setup(section),
        _CHECKS,
        _network(section),
        _OFFLINE,
        _train(section),
        _CONCLUDE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_preprocess(config: Config, config_path: str, name: str = "preprocess.sh") -> str:
    """The script that prepares the data, on a node without GPUs."""
    section = slurm_section(config, config_path)
    command = "python -m vectorlm.cli preprocess"
    parts = [
        _head("Prepares the data that a configuration names", name, config_path, False),
        _preprocess_requests(section),
        _one_config(config_path),
        _IN_A_JOB,
        _BEGIN,
        _setup(section),
        _CHECKS,
        _OFFLINE,
        _srun(section, "--export=ALL --ntasks=1", command, gpus=False),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def before_ranks(section: Slurm) -> str:
    """What a job's shell does before it starts ranks, for a launcher that writes its own script."""
    parts = (_BEGIN, _setup(section), _network(section), _OFFLINE)
    return "\n\n".join(part for part in parts if part)


def slurm_section(config: Config, config_path: str) -> Slurm:
    """The section that submitting cannot do without; `config_path` is for the message."""
    if config.slurm is None:
        raise ConfigError(
            f"{config_path}: slurm: section is missing; a job needs it. `slurm: {{}}` asks for one "
            "GPU; docs/config.md has its keys, such as partition, time and gpus_per_node"
        )
    return config.slurm


# --- what is asked of Slurm -----------------------------------------------------------------------


def _purpose(section: Slurm, tasks: int | None) -> str:
    nodes = f"{section.nodes} node{'s' if section.nodes != 1 else ''}"
    kind = "GPU" if section.gpus_per_node else "process"
    count = section.gpus_per_node or section.ranks_per_node
    plural = "" if count == 1 else "es" if kind == "process" else "s"
    with_what = f"{nodes} with {count} {kind}{plural}" + (" each" if section.nodes != 1 else "")
    if tasks:
        return f"Trains the {tasks} runs of a sweep, each on {with_what}"
    return f"Trains what a configuration says, on {with_what}"


def _head(purpose: str, name: str, default: str, sweep: bool) -> str:
    argument = "FOLDER" if sweep else "CONFIG"
    return f"""\
#!/bin/bash
# {_shown(purpose)}:
#
#   sbatch {_quoted(name)} [{argument}]      default: {_quoted(default)}
#
# Submit it from the folder that relative paths start from. Edit what you like: the lines follow
# from the section `slurm` of a configuration, and for any other they are printed by
#
#   vectorlm submit --config CONFIG --dry-run"""


def _requests(section: Slurm, tasks: int | None, at_once: int | None) -> str:
    limit = f"%{at_once}" if at_once else ""
    return "\n".join(
        [
            _directive("job-name", section.job_name),
            *_where(section),
            _directive("nodes", section.nodes),
            _directive("ntasks-per-node", section.ranks_per_node),
            *_gres(section),
            _directive("cpus-per-task", section.cpus_per_gpu),
            _directive("mem", section.mem),
            _directive("time", section.time),
            *_optional("array", f"0-{tasks - 1}{limit}" if tasks else None),
            *_mail(section),
            "# So many seconds before the time limit, the processes are asked to save and stop.",
            _directive("signal", f"USR1@{section.signal_lead_s}"),
            "# A job that starts again goes on where it was, and writes on in its log.",
            f"#SBATCH --{'requeue' if section.requeue else 'no-requeue'}",
            _directive("output", f"vectorlm-{'%A_%a' if tasks else '%j'}.log"),
            _directive("open-mode", "append"),
            *_extra(section),
        ]
    )


def _preprocess_requests(section: Slurm) -> str:
    """Not the GPU job's qos, constraint or nodes: they speak of other nodes than these."""
    wanted = section.preprocess
    return "\n".join(
        [
            _directive("job-name", f"{section.job_name}-data"),
            *_optional("partition", wanted.partition),
            *_optional("account", section.account),
            "#SBATCH --nodes=1",
            "#SBATCH --ntasks=1",
            _directive("cpus-per-task", wanted.cpus),
            _directive("mem", wanted.mem),
            _directive("time", wanted.time),
            *_mail(section),
            _directive("output", "vectorlm-data-%j.log"),
            _directive("open-mode", "append"),
        ]
    )


def _where(section: Slurm) -> list[str]:
    lines: list[str] = []
    for name in ("partition", "account", "qos", "constraint", "exclude", "reservation"):
        lines += _optional(name, getattr(section, name))
    return lines


def _gres(section: Slurm) -> list[str]:
    # GPUs a node, not a task: --gpus-per-task hides them from srun's processes.
    return _optional("gres", section.gres or None)


def _mail(section: Slurm) -> list[str]:
    if not section.mail_user:
        return []
    return [_directive("mail-user", section.mail_user), _directive("mail-type", section.mail_type)]


def _extra(section: Slurm) -> list[str]:
    for flag in section.extra_flags:
        if not re.fullmatch(FLAG, flag):
            raise ClusterError(
                f"slurm.extra_flags: {flag!r} cannot be written into a job script; a flag is like "
                "--exclusive or --nice=100"
            )
    return [f"#SBATCH {flag}" for flag in section.extra_flags]


def _optional(flag: str, value: str | None) -> list[str]:
    return [] if value is None else [_directive(flag, value)]


def _directive(flag: str, value: object) -> str:
    return f"#SBATCH --{flag}={word(str(value))}"


def word(text: str) -> str:
    """sbatch takes quotes, blanks, backslashes and # in these lines as syntax."""
    if not _WORD.fullmatch(text):
        raise ClusterError(
            f"slurm: {text!r} cannot be written into a job script; letters, digits and "
            "_.,:/@%+*[]()&|=- are allowed"
        )
    return text


# --- what the shell does --------------------------------------------------------------------------


def _one_config(config_path: str) -> str:
    return f"config=${{1:-{_quoted(config_path)}}}"


def _task_config(output_dir: str) -> str:
    return f"""\
# Each task of the array has a configuration of its own in the sweep's folder.
config=${{1:-{_quoted(output_dir)}}}
if [ -d "$config" ]; then
    config=$config/$(printf '{POINT_NAME}' "$SLURM_ARRAY_TASK_ID")/config.yaml
fi"""


_IN_A_JOB = """\
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$0: this is a job script; submit it: sbatch $0" >&2
    exit 2
fi"""

_BEGIN = """\
# A signal to the whole job must not end this shell before it has heard how the processes ended.
trap : TERM INT USR1 USR2

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
start=$((${SLURM_RESTART_COUNT:-0} + ${VECTORLM_EARLIER_STARTS:-0} + 1))
echo "== vectorlm: job $job, start $start, $(date -Is), on $SLURM_JOB_NODELIST\""""


def _setup(section: Slurm) -> str:
    if not section.setup:
        return ""
    for line in section.setup:
        if _CONTROL.search(line):
            raise ClusterError(
                f"slurm.setup: {line!r} holds a control character; give each line by itself"
            )
    return "\n".join(["# What this cluster needs first.", *section.setup])


_CHECKS = """\
# The Python environment that was active at submission; where none was, .venv if it is here.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    # shellcheck source=/dev/null
    [ ! -f .venv/bin/activate ] || source .venv/bin/activate
fi
if ! reason=$(python -c "import vectorlm.config.load" 2>&1); then
    echo "VectorLM cannot be imported here (${reason##*$'\\n'}), by $(command -v python)" >&2
    echo "Activate its environment before you submit, or have slurm.setup do so." >&2
    exit 2
fi
if [ ! -f "$config" ]; then
    echo "$config: no such file in $PWD; submit from the folder that the path is relative to" >&2
    exit 2
fi"""


def _network(section: Slurm) -> str:
    lines = [
        "# Where the processes of all nodes meet.",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
    ]
    interface = section.network_interface
    if interface:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        lines += [f"export {name}={_quoted(interface)}" for name in names]
    if section.disable_infiniband:
        lines.append("export NCCL_IB_DISABLE=1")
    return "\n".join(lines)


_OFFLINE = """\
# Compute nodes have no internet: nothing is fetched, and `wandb sync` uploads afterwards.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export WANDB_MODE=${WANDB_MODE:-offline}
export PYTHONUNBUFFERED=1"""


def _train(section: Slurm) -> str:
    flags = " ".join(FLAGS)
    command = _srun(section, flags, "python -m vectorlm.train", gpus=bool(section.gpus_per_node))
    return f"""\
# srun starts one process a GPU. When one fails, the others end at once, or are given up after 30 s:
# their node may be gone. srun forgets --cpus-per-task unless it is told again.
{command}
code=$?"""


_CONCLUDE = """\
# Says what ended the processes, and has Slurm start this job again where that helps; the exit code
# of the job is this one.
python -m vectorlm.conclude --config="$config" --code="$code" --script="$0\""""


def _srun(section: Slurm, flags: str, command: str, gpus: bool) -> str:
    first, *container = around(section, gpus)
    return " \\\n    ".join([f"srun {flags} {first}", *container, f'{command} --config="$config"'])


def around(section: Slurm, gpus: bool) -> list[str]:
    """What stands before the command of srun's processes: a flag, and the container if any."""
    lines = ['--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    if section.container_image and section.container_runtime == "pyxis":
        here = '"$PWD:$PWD"'  # relative paths stay what they are
        mounts = ",".join([here, *map(_mount, section.container_mounts)])
        lines.append(f"--container-image={_quoted(section.container_image)}")
        lines.append(f'--container-mounts={mounts} --container-workdir="$PWD"')
    elif section.container_image:
        mounts = ",".join(map(_mount, section.container_mounts))
        bind = f"--bind {mounts} " if mounts else ""
        nvidia = "--nv " if gpus else ""
        image = _quoted(section.container_image)
        lines.append(f'apptainer exec {nvidia}{bind}--pwd "$PWD" {image}')
    return lines


def _mount(text: str) -> str:
    """SOURCE:TARGET[:ro]; where only the source is given, the container sees it in its place."""
    source, *rest = text.split(":")
    return ":".join(map(_quoted, [source, *(rest or [source])]))


def _quoted(text: str) -> str:
    """One word for a shell, and one line: a line break would begin a directive or a command."""
    if "\n" in text or "\0" in text:
        raise ClusterError(f"{text!r} holds a line break, which no job script can; rename it")
    return shlex.quote(text)


def _shown(text: str) -> str:
    return _CONTROL.sub("?", text)


# --- the scripts in examples/ ---------------------------------------------------------------------


def examples() -> dict[Path, str]:
    """What the scripts in examples/ must hold."""
    return {
        ROOT / name: render(load_config(ROOT / path), path, name) for name, path in EXAMPLES.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the scripts in examples/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args(argv).check
    stale = {path: text for path, text in examples().items() if not _holds(path, text)}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)}: out of date; run `{COMMAND}`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)
            print(f"{path.relative_to(ROOT)}: written")
    return 1 if check and stale else 0


def _holds(path: Path, text: str) -> bool:
    return path.exists() and os.access(path, os.X_OK) and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
