"""Training on one NVIDIA GPU, beside HF Trainer: tokens a second, MFU and memory, in ten minutes.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 540] [--points 8b-full-4096 ...]
    python benchmarks/gpu.py --show FOLDER/results.json [--write]      no GPU needed
    python benchmarks/gpu.py --tiny                                    every line of it, on a CPU

Llamas with random weights: nothing is downloaded. A row of data is one document as long as the row,
so all do the same work. The points come in the order of what they tell; all that is known is
written after each contender, so nothing is lost when time runs out, and one that fails is a line
that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import POLL_S, Run, begin, vectorlm
from benchmarks.gpu_table import COMMAND, CONTENDERS, OURS, STAND_IN, row, text_of
from benchmarks.paper import ROOT, arguments, processor, say, write
from benchmarks.subject import make_rows, whole_vocabulary
from vectorlm import __version__
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.errors import VectorLMError
from vectorlm.plan.flops import train_flops_per_token
from vectorlm.plan.gpus import find_gpu
from vectorlm.plan.lora import adapters_of
from vectorlm.plan.outlook import outlook_for, planned_for
from vectorlm.plan.shapes import read_shape

ROWS = 64  # of data; they come again
CLOCKS_S = 2.0  # between looks at the clocks
LIMIT_S = 300.0  # for a contender
END_S = 30.0  # for it to end when asked to

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
}
# hidden, intermediate, layers, heads, heads of keys, vocabulary
SHAPES = {
    "1.1b": (2048, 5632, 22, 32, 4, 32_000),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
LONGEST = 8192


@dataclass(frozen=True)
class Point:
    """`warm_up`: steps before the `steps` that are measured; `least_s`: what a contender takes at
    least, so that it is not begun for nothing."""

    model: str
    trained: str
    length: int
    rows: int
    precision: str = "bf16-mixed"
    recompute: bool = False
    warm_up: int = 5
    steps: int = 15
    least_s: float = 20.0
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.trained}-{self.length}{self.variant}"


def small(trained: str, length: int) -> Point:
    return Point("1.1b", trained, length, 16_384 // length)


def large(trained: str, length: int, masters: bool = False) -> Point:
    """Trained whole, blocks are recomputed, as for the published figures. With 32-bit masters
    (16 bytes a parameter) there is hardly room for anything else, so they are a point apart.
    """
    if trained == "lora":
        return Point("8b", trained, length, 8_192 // length, "bf16-mixed", False, 3, 8, 40.0)
    precision, variant = ("bf16-mixed", "-masters") if masters else ("bf16-true", "")
    return Point("8b", trained, length, 16_384 // length, precision, True, 3, 8, 40.0, variant)


POINTS = [
    large("full", 4096),
    large("lora", 4096),
    small("full", 4096),
    small("lora", 4096),
    large("full", 8192),
    large("lora", 8192),
    small("full", 2048),
    small("full", 8192),
    large("full", 4096, masters=True),
    large("full", 2048),
    large("lora", 2048),
    small("lora", 2048),
    small("lora", 8192),
]
TINY = [
    Point("tiny", "full", 64, 2, "bf16-mixed", True, 1, 2, 0.0),
    Point("tiny", "lora", 64, 2, "bf16-mixed", False, 1, 2, 0.0),
]


# --- the machine ----------------------------------------------------------------------------------


def asked(*names: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU that is used; nothing where it is not there."""
    which = os.environ["CUDA_VISIBLE_DEVICES"]
    query = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(names)}"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
        values = [value.strip() for value in done.stdout.strip().split(",")]
        if done.returncode == 0 and len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {}


def clocks() -> dict[str, str]:
    return asked("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def machine(has_gpu: bool) -> dict[str, Any]:
    import torch

    versions = {"vectorlm": __version__}
    for name in ("torch", "transformers", "peft", "accelerate", "flash-attn"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    about = asked("name", "driver_version", "memory.total", "power.limit") if has_gpu else {}
    return {
        "gpu": (about.get("name") or torch.cuda.get_device_name()) if has_gpu else None,
        "driver": about.get("driver_version"),
        "nvidia-smi": about,
        "cuda": torch.version.cuda,
        "versions": versions,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


# --- what is trained ------------------------------------------------------------------------------


def make_model(name: str, layers: int, folder: Path) -> None:
    """A folder with random weights in 16 bits, made on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    hidden, intermediate, own_layers, heads, kv_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or own_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    whole_vocabulary(folder, vocabulary)


def configuration(point: Point, model: Path, data: Path, out: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "train_parameters": {
            "output_dir": str(out),
            "max_seq_len": point.length,
            "epochs": 1000,
            "precision": point.precision,
            "use_activation_checkpointing": point.recompute,
            "lora_peft_config": LORA if point.trained == "lora" else None,
            "logging_steps": 1,
            "checkpointing_enabled": False,
            "lr_scheduler_type": "constant",
            "optimizer": {"lr": 1e-5},
        },
        "dataset": {"train_ds": str(data), "train_bs": point.rows},
    }


@dataclass(frozen=True)
class Bench:
    """Where the models and rows of a run of this benchmark lie, and what all its points share."""

    folder: Path
    layers: int
    overrides: Sequence[str]
    gpu: str
    deadline: float

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def model(self, name: str) -> Path:
        """Made once, by a process of its own, which leaves nothing on the GPU."""
        folder = self.folder / f"{name}-{self.layers}"
        if not (folder / "tokenizer.json").exists():  # it is written last
            say(f"making {folder}")
            command = [sys.executable, __file__, "--make-model", name, str(folder)]
            command += ["--layers", str(self.layers)]
            subprocess.run(command, check=True, timeout=LIMIT_S)
        return folder

    def prepared(self, point: Point, contender: str) -> Path:
        """A folder with the YAML of a point; model and rows are made where they are not yet."""
        model = self.model(point.model)
        data = self.folder / f"rows-{point.model}-{point.length}"
        if not data.exists():
            make_rows(data, model, ROWS, point.length, SHAPES[point.model][-1])
        folder = self.folder / f"{point.name}-{contender}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        vectorlm(configuration(point, model, data, folder / "out"), folder, ranks=1)
        return folder


# --- what is planned, and MFU ---------------------------------------------------------------------


def planned(config: Config, gpu: str) -> dict[str, Any]:
    """As `vectorlm plan` has it, uncorrected by what was measured on this GPU before."""
    assert config.dataset
    known = find_gpu(gpu)
    shape, hardware = read_shape(config.model), planned_for(config, known, 1)
    outlook = outlook_for(config, shape, hardware, config.dataset.train_bs, corrects=False)
    return {
        "fits": outlook.fits,
        "memory_gib": outlook.peak_bytes / 2**30,
        "tokens_per_s": outlook.tokens_per_second,
    }


def flops_per_token(config: Config) -> float:
    """The formula of VectorLM's log, for all contenders."""
    train = config.train_parameters
    shape = read_shape(config.model)
    adapters = adapters_of(train.lora_peft_config, shape)
    multiplied = shape.multiplied_parameters + (adapters.parameters(shape) if adapters else 0)
    return train_flops_per_token(
        multiplied, shape.layers, shape.hidden, train.max_seq_len, adapters is None
    )


def mfu(tokens_per_s: float, config: Config, gpu: str) -> float | None:
    known = find_gpu(gpu)
    return tokens_per_s * flops_per_token(config) / (known.half_tflops * 1e12) if known else None


# --- contenders -----------------------------------------------------------------------------------


def measure(point: Point, name: str, folder: Path, bench: Bench) -> dict[str, Any]:
    """What a contender did at a point, or why it did not; never an error of its own."""
    before = clocks()
    seen: list[dict[str, str]] = []
    limit_s = min(LIMIT_S, bench.left_s())
    overrides = [f"--set={item}" for item in bench.overrides]
    result = folder / "result.json"
    if name == OURS:
        command = [sys.executable, "-m", "vectorlm.cli", "train", *overrides]
    else:
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_peer.py"), *overrides]
        command += ["--attention", name, "--result", str(result)]
        command += ["--warm-up", str(point.warm_up), "--steps", str(point.steps)]
    run = begin(name, [*command, "--config", "config.yaml"], folder)
    began = time.monotonic()
    try:
        if watch(run, point, name == OURS, limit_s, seen):
            found = of_ours(run, point) if name == OURS else json.loads(result.read_text())
        else:
            found = {"failed": reason(run, limit_s), "output": run.said()}
    finally:
        run.end()
    took = {"took_s": round(time.monotonic() - began, 1)}
    return {**found, **took, "clocks": {"before": before, "during": seen, "after": clocks()}}


def watch(run: Run, point: Point, endless: bool, limit_s: float, seen: list[Any]) -> bool:
    """Until the last step is logged, or until it has ended where it ends by itself; looks at the
    clocks while steps are measured.
    """
    began = looked = time.monotonic()
    while time.monotonic() - began < limit_s:
        done = len(run.steps())
        if endless and done >= point.warm_up + point.steps:
            return True
        if run.process.poll() is not None:
            return not endless and run.process.returncode == 0
        if done >= point.warm_up and time.monotonic() - looked > CLOCKS_S:
            seen.append(clocks())
            looked = time.monotonic()
        time.sleep(POLL_S)
    return False


def of_ours(run: Run, point: Point) -> dict[str, Any]:
    """From its own log; then it is asked to stop, as Slurm would."""
    steps = run.steps()[: point.warm_up + point.steps]
    measured = steps[point.warm_up :]
    tokens = measured[-1]["tokens"] - steps[point.warm_up - 1]["tokens"]
    run.process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(END_S)
    said = run.output.read_text(encoding="utf-8").splitlines()
    return {
        "tokens_per_s": tokens / sum(step["seconds"] for step in measured),
        "memory_gib": measured[-1].get("memory_gib"),
        "data_wait_s": round(sum(step["data_wait_s"] for step in measured), 3),
        "step_s": [step["seconds"] for step in measured],
        "mfu_logged": median(step["mfu"] for step in measured) if "mfu" in steps[0] else None,
        "said": [line for line in said if line.startswith(("attention:", "loss:"))],
    }


def reason(run: Run, limit_s: float) -> str:
    if run.process.poll() is None:
        return f"not done after {limit_s:.0f} s"
    said = run.said()
    if "out of memory" in said:
        return "out of memory"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with {run.process.returncode}"


# --- the whole ------------------------------------------------------------------------------------


def save(results: dict[str, Any], out: Path) -> None:
    """Both files whole at any time: the run may be killed."""
    contents = {"results.json": json.dumps(results, indent=1), "table.md": text_of(results)}
    for name, content in contents.items():
        (out / f".{name}").write_text(content + "\n", encoding="utf-8")
        os.replace(out / f".{name}", out / name)


def measure_point(point: Point, bench: Bench, results: dict[str, Any]) -> Iterator[None]:
    """Contender by contender; yields when there is something new to save."""
    folders = {name: bench.prepared(point, name) for name in results["contenders"]}
    config = load_config(next(iter(folders.values())) / "config.yaml", bench.overrides)
    train = config.train_parameters
    assert config.dataset
    entry: dict[str, Any] = {"name": point.name, **asdict(point)} | {
        "rows": config.dataset.train_bs,  # as the YAML and --set have it
        "precision": train.effective_precision,
        "recompute": train.use_activation_checkpointing,
        "planned": planned(config, bench.gpu),
        "contenders": {},
    }
    results["points"].append(entry)
    for name, folder in folders.items():
        if bench.left_s() < point.least_s:
            results["not_measured"].append(f"{point.name} by {CONTENDERS[name]}")
            continue
        found = measure(point, name, folder, bench)
        if "failed" not in found:
            found["mfu"] = mfu(found["tokens_per_s"], config, bench.gpu)
        entry["contenders"][name] = found
        say(row(entry, name, found))
        yield


def measure_all(points: Sequence[Point], bench: Bench, results: dict[str, Any], out: Path) -> None:
    for point in points:
        if bench.left_s() < point.least_s:
            results["not_measured"].append(point.name)
            continue
        try:
            for _ in measure_point(point, bench, results):
                save(results, out)
        except (subprocess.SubprocessError, OSError, VectorLMError) as error:
            results["failed"][point.name] = str(error)
            say(f"{point.name}: {error}")
    save(results, out)


def chosen(given: argparse.Namespace) -> list[Point]:
    offered = {point.name: point for point in (TINY if given.tiny else POINTS)}
    unknown = set(given.points or ()) - offered.keys()
    if unknown:
        raise SystemExit(f"--points: {', '.join(unknown)}; there are {', '.join(offered)}")
    return [offered[name] for name in given.points or offered]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(COMMAND, __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="where results.json and table.md go")
    add("--seconds", type=float, default=540.0, help="after that no contender runs on")
    add("--points", nargs="+", metavar="NAME", help="these only, in this order")
    add("--contenders", nargs="+", choices=CONTENDERS, help="these only")
    add("--layers", type=int, default=0, help="instead of the models' own")
    add("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    add("--models", type=Path, help="a folder in which models are kept for the next time")
    add("--tiny", action="store_true", help="a tiny model, to try this script; needs no GPU")
    add("--show", type=Path, metavar="FILE", help="measure nothing, tell of these results.json")
    add("--make-model", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    if given.make_model:
        make_model(given.make_model[0], given.layers, Path(given.make_model[1]))
        return 0
    if given.show:
        return tell(json.loads(given.show.read_text(encoding="utf-8")), given.write)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a contender ends with this process
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ |= {"CUDA_VISIBLE_DEVICES": first, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not given.tiny:
        print(f"{COMMAND}: torch finds no GPU here; --tiny tries it without one", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(has_gpu),
        "layers": given.layers,
        "overrides": given.overrides,
        "contenders": given.contenders
        or [n for n in CONTENDERS if find_spec("flash_attn") or n != "flash_attention_2"],
        "points": [],
        "failed": {},
        "not_measured": [],
    }
    with tempfile.TemporaryDirectory(prefix="vectorlm-gpu-") as name:
        folder = (given.models or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        gpu = results["machine"]["gpu"] or STAND_IN
        bench = Bench(folder, given.layers, given.overrides, gpu, began + given.seconds)
        measure_all(chosen(given), bench, results, given.out.resolve())
    return tell(results, given.write)


def tell(results: dict[str, Any], writes: bool) -> int:
    text = text_of(results)
    print(text)
    if writes:
        write(COMMAND, text)
    ours = [point["contenders"].get(OURS, {}) for point in results["points"]]
    return 0 if any("tokens_per_s" in found for found in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
