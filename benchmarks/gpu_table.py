"""What `benchmarks/gpu.py` tells of its results, as tables; the results are what its results.json
holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.paper import wrapped

COMMAND = "python benchmarks/gpu.py"
STAND_IN = "H200"  # planned for, where a trial run has no GPU

OURS = "vectorlm"
CONTENDERS = {  # a peer's name is that of its attention
    OURS: "VectorLM",
    "sdpa": "HF Trainer, SDPA",
    "flash_attention_2": "HF Trainer, flash-attn 2",
}


@dataclass(frozen=True)
class Bar:
    """A published figure, and which of ours stands beside it."""

    said: str
    point: str
    what: str
    value: float


BARS = (
    Bar("7 B, whole, blocks recomputed, H200s", "8b-full-4096", "mfu", 0.578),
    Bar("7 B, whole, A100s", "8b-full-4096", "mfu", 0.548),
    Bar("8 B, LoRA, length 4096, one H100", "8b-lora-4096", "tokens_per_s", 12_473),
)

HEADER = (
    "| | | rows | precision | blocks | tokens a second | VectorLM's are times that | planned | MFU "
    "| GiB | planned | waited for data, s |"
)


def table(results: dict[str, Any]) -> str:
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for point in results["points"]:
        lines += [row(point, name, found) for name, found in point["contenders"].items()]
    return "\n".join(lines)


def row(point: dict[str, Any], name: str, found: dict[str, Any]) -> str:
    blocks = "recomputed" if point["recompute"] else "kept"
    what = [f"`{point['name']}`", CONTENDERS[name], f"{point['rows']} x {point['length']}"]
    what += [point["precision"], blocks]
    plan = point["planned"] if name == OURS else {}
    rate, memory = found.get("tokens_per_s"), found.get("memory_gib")
    ours = point["contenders"].get(OURS, {}).get("tokens_per_s")
    times = ours / rate if ours and rate and name != OURS else None
    said = found["failed"].replace("|", "/")[:100] if "failed" in found else told(rate, ",.0f")
    cells = [said, told(times, ".2f"), against(plan.get("tokens_per_s"), rate, ",.0f")]
    cells += [told(found.get("mfu"), ".1%"), told(memory, ".1f")]
    cells += [against(plan.get("memory_gib"), memory, ".1f"), told(found.get("data_wait_s"), ".2f")]
    return f"| {' | '.join([*what, *cells])} |"


def told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def against(plan: float | None, measured: float | None, form: str) -> str:
    """What was planned, and how far that is off."""
    off = f" ({plan / measured - 1:+.0%})" if plan and measured else ""
    return told(plan, form) + off


def bars(results: dict[str, Any]) -> str:
    """Published figures, which others got with other data, code and numbers of GPUs."""
    here = {point["name"]: point["contenders"].get(OURS, {}) for point in results["points"]}
    lines = ["| published | | here |", "|---|---|---|"]
    for bar in BARS:
        own = here.get(bar.point, {}).get(bar.what)
        forms = {"mfu": "{:.1%} MFU", "tokens_per_s": "{:,.0f} tokens a second"}
        values = [forms[bar.what].format(v) if v else "not measured" for v in (bar.value, own)]
        lines.append(f"| {bar.said} | {values[0]} | {values[1]} (`{bar.point}`) |")
    return "\n".join(lines)


def clock_range(results: dict[str, Any]) -> str:
    seen = [
        reading
        for point in results["points"]
        for found in point["contenders"].values()
        for reading in found["clocks"]["during"]
    ]
    told = []
    for name, said in (
        ("clocks.sm", "MHz"),
        ("clocks.mem", "MHz of memory"),
        ("power.draw", "W"),
        ("temperature.gpu", "degrees"),
    ):
        values = [float(r[name]) for r in seen if r.get(name, "").replace(".", "").isdigit()]
        if values:
            told.append(f"{min(values):.0f}-{max(values):.0f} {said}")
    return f" Seen while they ran: {', '.join(told)}." if told else ""


def text_of(results: dict[str, Any]) -> str:
    where = results["machine"]
    gpu = where["gpu"] or f"no GPU (a trial run, planned for one {STAND_IN})"
    driver = f", driver {where['driver']}, CUDA {where['cuda']}" if where["driver"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    said = sorted(
        {
            line
            for point in results["points"]
            for line in point["contenders"].get(OURS, {}).get("said", ())
        }
    )
    about = (
        f"Measured on {results['date']} by `{COMMAND}`: {gpu}{driver}; "
        f"{where['processor']}, {where['cores']} cores; {versions}.{clock_range(results)} Random "
        "weights, AdamW; a micro-batch is a step; a row of data is one document. MFU counts no "
        "recomputation, and of attention what is causal; with LoRA, no gradients of frozen "
        "weights. GiB is the allocator's own peak."
    )
    if results["layers"]:
        about += f" Models of {results['layers']} layers only."
    if results["overrides"]:
        about += f" With {', '.join(f'`{item}`' for item in results['overrides'])}."
    parts = [wrapped(about), table(results), bars(results)]
    parts += [wrapped(f"VectorLM's log: {'; '.join(said)}.")] if said else []
    parts += [wrapped(f"{name} failed: {why}") for name, why in results["failed"].items()]
    if results["not_measured"]:
        parts.append(wrapped(f"No time was left for {', '.join(results['not_measured'])}."))
    return "\n\n".join(parts)
