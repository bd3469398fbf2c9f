"""How fast conversations become packed rows: the part `--chat` of benchmarks/preprocess.py.

    python benchmarks/preprocess.py --chat [--write] [--rounds 5] [--conversations 20000]

The conversations are made of lines of the Python files installed here: one to four questions with
answers, half of the answers with thinking. Beside VectorLM, `datasets.map` calls transformers'
`apply_chat_template(..., tokenize=True)` on each, as its documentation tells; that finds ids only,
and not which of them are learned. With one process and with as many as there are cores; whole
processes, in turns, with the same templates.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.paper import ROOT, circumstances, say, spread, write
from benchmarks.preprocess import (
    MAX_SEQ_LEN,
    Place,
    Run,
    documents,
    make_corpus,
    make_tokenizer,
    row_ids,
    run,
)

COMMAND = "python benchmarks/preprocess.py --chat"
TEMPLATES = {
    "ChatML": ROOT / "configs/chatml.jinja",
    "like Llama-3's": ROOT / "tests/data/chat/templates/llama3.jinja",
    "like Qwen3's, with thinking": ROOT / "tests/data/chat/templates/qwen3.jinja",
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TRAINED_ON_MB = 20
OURS, THEIRS = "VectorLM", "datasets.map, apply_chat_template"


# --- what is read -----------------------------------------------------------------------


def lines() -> Iterator[str]:
    """Of some words each."""
    for text in cycle(documents()):
        yield from (line for line in map(str.strip, text.splitlines()) if len(line) > 20)


def make_conversations(path: Path, count: int) -> None:
    chance, said = random.Random(1), lines()

    def text(least: int, most: int) -> str:
        return "\n".join(next(said) for _ in range(chance.randint(least, most)))

    def turn() -> list[dict[str, str]]:
        answer = {"role": "assistant", "content": text(2, 16)}
        if chance.random() < 0.5:
            answer["reasoning_content"] = text(2, 16)
        return [{"role": "user", "content": text(1, 6)}, answer]

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [message for _ in range(chance.randint(1, 4)) for message in turn()]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_chat_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer

    corpus = folder / "texts.jsonl"
    make_corpus(corpus, TRAINED_ON_MB * 10**6)
    made = make_tokenizer("byte-level", corpus, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(made / "tokenizer.json"))
    return made


# --- the contenders ---------------------------------------------------------------------


def ours(place: Place, template: Path, processes: int) -> list[str]:
    config = {
        "model": str(place.tokenizer),
        "train_parameters": {"output_dir": str(place.out / "run"), "max_seq_len": MAX_SEQ_LEN},
        "dataset": {"train_ds": str(place.out / "rows")},
        "dataset_preprocess": {
            "load_path": str(place.corpus),
            "save_path": str(place.out / "rows"),
            "packing_type": "full",  # so that ids can be compared one by one
            "chat_template": str(template),
            "workers": processes,
        },
    }
    file = place.out / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, str(ROOT / "preprocess_data.py"), "--config", str(file)]


MAP = """
import os, sys
corpus, folder, out, template, processes = sys.argv[1:]
os.environ["HF_DATASETS_CACHE"] = out + "/cache"
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(template, encoding="utf-8") as file:
    tokenizer.chat_template = file.read()
def rendered(row):
    ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    return {"input_ids": ids}
rows = load_dataset("json", data_files=corpus, split="train")
rows = rows.map(rendered, remove_columns=rows.column_names, num_proc=int(processes))
rows.save_to_disk(out + "/rows")
"""


def theirs(place: Place, template: Path, processes: int) -> list[str]:
    given = (place.corpus, place.tokenizer, place.out, template, processes)
    return [sys.executable, "-c", MAP, *map(str, given)]


class Contender(NamedTuple):
    name: str
    processes: int

    def turn(self, place: Place, template: Path) -> Run:
        shutil.rmtree(place.out, ignore_errors=True)
        place.out.mkdir()
        made = ours if self.name == OURS else theirs
        return run(made(place, template, self.processes), place.out.parent / "log")


# --- measuring and telling --------------------------------------------------------------


def check_ids(place: Place, template: Path) -> int:
    """How many tokens there are; every one of ours must be theirs."""
    import datasets

    Contender(THEIRS, 1).turn(place, template)
    column = datasets.load_from_disk(str(place.out / "rows")).data.column("input_ids")
    wanted: Any = np.concatenate([chunk.values.to_numpy() for chunk in column.chunks])
    Contender(OURS, 2).turn(place, template)
    if not np.array_equal(wanted, row_ids(place.out / "rows")):
        raise RuntimeError(f"{template}: VectorLM's ids are not those of apply_chat_template")
    return len(wanted)


def measure(place: Place, template: Path, rounds: int) -> dict[Contender, list[float]]:
    cores = len(os.sched_getaffinity(0))
    contenders = [Contender(name, n) for n in dict.fromkeys([1, cores]) for name in (OURS, THEIRS)]
    found: dict[Contender, list[float]] = {one: [] for one in contenders}
    for number in range(rounds):
        for one in contenders:
            found[one].append(one.turn(place, template).seconds)
            say(f"round {number + 1}, {one.name}, {one.processes}: {found[one][-1]:.2f} s")
    return found


def table(name: str, count: int, tokens: int, found: dict[Contender, list[float]]) -> str:
    lines = [
        f"A template {name}, {tokens / 1e6:.1f} M tokens:"
        if name != "ChatML"
        else f"ChatML, {tokens / 1e6:.1f} M tokens:",
        "",
        "| | processes | seconds | conversations a second | times VectorLM |",
        "|---|---|---|---|---|",
    ]
    for one, seconds in found.items():
        base = found[Contender(OURS, one.processes)]
        ratios = [mine / other for mine, other in zip(seconds, base, strict=True)]
        lines.append(
            f"| {one.name} | {one.processes} | {spread(seconds, '.2f')} "
            f"| {count / median(seconds):,.0f} | {spread(ratios, '.1f')} |"
        )
    return "\n".join(lines)


def main(rounds: int, count: int, into_paper: bool) -> int:
    load = os.getloadavg()[0]
    told: Sequence[str] = []
    with tempfile.TemporaryDirectory(prefix="vectorlm-preprocess-") as name:
        folder = Path(name)
        tokenizer = make_chat_tokenizer(folder)
        corpus = folder / "conversations.jsonl"
        make_conversations(corpus, count)
        place = Place(corpus, tokenizer, folder / "out")
        for kind, template in TEMPLATES.items():
            tokens = check_ids(place, template)
            told = [*told, table(kind, count, tokens, measure(place, template, rounds))]
        size = corpus.stat().st_size / 1e6
    about = (
        f"{count:,} conversations, {size:.1f} MB of JSONL; rows of {MAX_SEQ_LEN} tokens. A figure "
        f"is the median of {rounds} rounds (least-most)."
    )
    packages = ("fastokens", "tokenizers", "datasets", "transformers")
    text = "\n\n".join([circumstances(COMMAND, load, packages, about), *told])
    print(text)
    if into_paper:
        write(COMMAND, text)
    return 0
