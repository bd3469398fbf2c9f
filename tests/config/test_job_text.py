"""Texts for a job script: what users have is taken, and nothing that could become a command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.config.mistakes import BASE
from vectorlm.config.job_text import duration_s
from vectorlm.config.keys import Key, all_keys
from vectorlm.config.load import load_config
from vectorlm.config.schema import Slurm
from vectorlm.errors import ConfigError

KEYS = {
    ".".join(path[1:]): key
    for path, key in all_keys().items()
    if path[0] == "slurm" and key.kind in ("text", "texts")
}

# What users have in their files; every text key must be here.
TAKEN: dict[str, list[Any]] = {
    "job_name": ["vectorlm", "llama-7b_lora.3", "a@b", "8b+long"],
    "partition": ["gpu", "gpu-a100,gpu", "gpu_p2", "2080ti"],
    "account": ["def-prof_gpu", "abc123", "rrg-x_gpu"],
    "qos": ["normal", "m2", "gpu-short"],
    "gpu_type": ["a100", "nvidia_h100_80gb_hbm3", "a100_3g.20gb", "1g.10gb"],
    "mem": ["0", "120G", "1T", "500000M", "64000", "32g", 0, 64000],
    "time": ["90", "1:30", "08:00:00", "8:0:0", "1-0", "2-12:30", "1-12:00:00", "100:00:00", 90],
    "constraint": ["a100", "a100&ib", "[a100*2|h100]", "(a100|h100)&ib", "gpu:a100*2", "v=1,w"],
    "exclude": ["gpu03", "gpu[03,07-09]", "node-[1-3],rack1node2", "g1.example.org"],
    "reservation": ["root_1", "maint,course-2"],
    "mail_user": ["you@example.org", "a.b+c@cs.uni-x.edu", "me"],
    "mail_type": ["NONE", "ALL", "END,FAIL", "TIME_LIMIT_80,REQUEUE", "ARRAY_TASKS,FAIL"],
    "network_interface": ["eth0", "ib0,ib1", "enp1s0f0np0", "bond0.100", "hsn0", "eth0:1"],
    "setup": [
        ["module load cuda/12.4", 'source ~/venv/bin/activate && export X="$HOME" # ü', "a | b; c"],
        [],
    ],
    "container_image": [
        "/scratch/x/y.sif",
        "./pytorch.sqsh",
        "docker://nvcr.io/nvidia/pytorch:25.01-py3",
        "nvcr.io#nvidia/pytorch:25.01-py3",
        "user@registry.org:5000#team/image:1+a",
        "oras://ghcr.io/a/b@sha256:0123",
    ],
    "container_mounts": [["/scratch", "/host/x:/x", "/host/y:/y:ro", "/a/u@v/d=1:/b:rw"]],
    "extra_flags": [
        ["--exclusive", "--nice=-100", "--licenses=fs:1,x@y", "--switches=2@10:00"],
        ["--nodelist=gpu[01-02]", "--comment=a+b", "--distribution=block:*", "--tmp=100G"],
    ],
    "extra_gres": [["lscratch:100", "nvme", "fpga:u280:2", "bandwidth:5G"]],
    "preprocess.partition": ["cpu", "cpu,long"],
    "preprocess.mem": ["32G", 0],
    "preprocess.time": ["04:00:00", 240],
}

REFUSED: dict[str, list[Any]] = {
    "job_name": ["", " a", "a b", "-a", "a/b", "a\n", "a%b", "a\u2028", "ä", 7, True, None],
    "partition": ["gpu,", ",gpu", "gpu, cpu", "gpu,-p", "a;b", "a|b"],
    "mem": ["120GB", "1.5T", "-1", -1, 1.5, "1 G", "", "0x10", True],
    "time": ["UNLIMITED", "1:90", "1-", "-1", -1, "1:2:3:4", "1-2:3:4:5", "1h", "8:00:00 ", True],
    "constraint": ["a100 & ib", "-a", "a;b", "a`b`", "$a", "a>b", "&a"],
    "exclude": ["gpu 1", "gpu{1,2}", "-x", "[1]"],
    "mail_user": ["a@", "@b", "-a@b", "a@b;c", "a b@c", "a@-b"],
    "mail_type": ["END,", "end", "FAIL,SOON", "END FAIL"],
    "network_interface": ["^docker0", "=eth0", "eth0,", "-e", "e*"],
    "setup": ["module load x", ["a\nb"], ["a\r"], ["a\\"], [""], ["a\u0085b"], ["a\tb"], [1]],
    "container_image": ["~/x.sif", "$X/y", "-x", "a b", "x?y=1", "x;y"],
    "container_mounts": [["/a:ro"], ["a"], ["~/a"], ["/a,/b"], ["/a:/b:rx"], ["-/a"], ["/a:b"]],
    "extra_flags": [["-t 5"], ["exclusive"], ["--comment=a b"], ["--x='a'"], ["--a=b&c"], ["--A"]],
    "extra_gres": [["lscratch:"], ["-x"], ["a,b"], ["a:b:c:d"], ["a b"], ["a=1"]],
    "preprocess.partition": ["a b"],
}


def slurm(name: str, value: Any) -> Slurm:
    section, _, inner = name.rpartition(".")
    return Slurm.model_validate({section: {inner: value}} if section else {name: value})


def is_taken(name: str, value: Any) -> bool:
    try:
        slurm(name, value)
    except ValidationError:
        return False
    return True


def test_the_table_has_every_text() -> None:
    assert KEYS.keys() == TAKEN.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in TAKEN for value in TAKEN[name]], ids=str
)
def test_taken(name: str, value: Any) -> None:
    kept: Any = slurm(name, value)
    for part in name.split("."):
        kept = getattr(kept, part)
    assert kept == (str(value) if isinstance(value, int) else value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]], ids=repr
)
def test_refused(name: str, value: Any) -> None:
    if name == "job_name" and value is None:
        assert not KEYS[name].nullable
    assert not is_taken(name, value)


def test_texts_have_an_end() -> None:
    for name, values in TAKEN.items():
        text = "a" * 1001
        long = [f"--{text}"] if name == "extra_flags" else [f"/{text}"]
        assert not is_taken(name, long if isinstance(values[0], list) else text), name


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("1:30", 90),
        ("08:00:00", 8 * 3600),
        ("1-0", 86400),
        ("2-12:30", 60 * 3600 + 30 * 60),
        ("1-12:00:05", 36 * 3600 + 5),
        ("0", 0),
    ],
)
def test_duration(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds
    assert Slurm(time=text).time_s == seconds


# --- fuzz -----------------------------------------------------------------------------------------

# The promise, said apart from the patterns: what each key may hold beside letters and digits. A new
# key holds no more than PLAIN until it is named here.
PLAIN = "_.@+-:,/"
MORE = {
    "constraint": "[]()&|*=",
    "exclude": "[]",
    "container_image": "#=",
    "container_mounts": "=",
    "extra_flags": "%=*[]",
}
NASTY = [
    *"\n\r\0\t\x0b\x0c\x1b\x7f\x85\xa0\u2028\u2029\ufeff\u202e '\"`$;|&<>(){}[]*?!#~\\^%=-,:/@+",
    *"äπ你\u0301\U0001f600",
    *("$(id)", "`id`", "${IFS}", "&&", "||", "\r\n", "\n#SBATCH --wrap=id", " --wrap=id", "\\\n"),
    *("-", "--", "-t", "'\\''", '"', "ro", "00", "a", "G", "END", "gpu"),
]


def keeps_the_promise(name: str, text: str) -> bool:
    if name == "setup":
        return not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", text) and text[-1:] not in (
            "\\",
            "",
        )
    allowed = re.escape(PLAIN + MORE.get(name, ""))
    is_flag = name == "extra_flags"
    start = text.startswith("--") if is_flag else not text.startswith("-")
    return start and re.fullmatch(f"[A-Za-z0-9{allowed}]+", text) is not None


def seeds(name: str) -> list[str]:
    if KEYS[name].kind == "text":
        return [str(value) for value in TAKEN[name]]
    return [item for items in TAKEN[name] for item in items]


def mutated(name: str, random: Random) -> str:
    """A text that is taken, with something put in, taken out or put behind it; or only junk."""
    text = random.choice(seeds(name)) if random.random() < 0.8 else ""
    for _ in range(random.choice((0, 1, 1, 1, 2, 5))):
        at = random.choice((0, len(text), random.randint(0, len(text))))
        text = text[:at] + random.choice(NASTY) + text[at + random.randint(0, 1) :]
    return text


def wrapped(key: Key, text: str, random: Random) -> Any:
    if key.kind == "text":
        return text
    items = [text, *random.choice(TAKEN[key.name])]
    random.shuffle(items)
    return items


@pytest.mark.parametrize("name", KEYS)
def test_fuzz_of_the_schema(name: str) -> None:
    random = Random(f"schema {name}")
    taken = [
        text
        for text in (mutated(name, random) for _ in range(2500))
        if is_taken(name, wrapped(KEYS[name], text, random))
    ]
    assert 50 < len(taken) < 2450
    assert [text for text in taken if not keeps_the_promise(name, text)] == []


def texts_of(name: str, config: Any) -> Iterator[str]:
    value = config.slurm
    for part in name.split("."):
        value = getattr(value, part)
    yield from [] if value is None else [value] if isinstance(value, str) else value


def from_file(name: str, value: Any, path: Path, escaped: bool = True) -> Any:
    section = value
    for part in reversed(["slurm", *name.split(".")]):
        section = {part: section}
    text = yaml.safe_dump(section, allow_unicode=not escaped)
    path.write_text(BASE + text, encoding="utf-8", newline="")
    return load_config(path)


def from_raw_file(name: str, value: Any, path: Path) -> Any:
    """With characters at which YAML may break lines as they stand."""
    return from_file(name, value, path, escaped=False)


def from_override(name: str, value: Any, path: Path) -> Any:
    path.write_text(BASE, encoding="utf-8")
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    return load_config(path, [f"slurm.{name}={text}"])


@pytest.mark.parametrize("door", [from_file, from_raw_file, from_override])
def test_fuzz_of_the_loader(door: Callable[[str, Any, Path], Any], tmp_path: Path) -> None:
    random, path, told, broken = Random(1), tmp_path / "c.yaml", 0, []
    for name in KEYS:
        for _ in range(12):
            value = wrapped(KEYS[name], mutated(name, random), random)
            try:
                config = door(name, value, path)
            except ConfigError:
                told += 1
                continue
            kept = list(texts_of(name, config))
            broken += [text for text in kept if not keeps_the_promise(name, text)]
            if door is from_file:
                assert kept == ([value] if isinstance(value, str) else value)
    assert broken == []
    assert 20 < told < 12 * len(KEYS) - 20
