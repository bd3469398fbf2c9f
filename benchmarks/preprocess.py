"""How fast text becomes packed rows, whole processes, beside what others do with the same text.

    python benchmarks/preprocess.py [--write] [--rounds 5] [--mb 100]
    python benchmarks/preprocess.py --chat [--write] [--rounds 5] [--conversations 20000]

The corpus is made of the Python files installed here, a document a file, in an order that their
names' hashes give; the two tokenizers (byte-level, as GPT-2's or Llama-3's; SentencePiece-like, as
Llama-2's) are trained on a part of it. In every round each contender runs once as a process of its
own, from its start to its end. The others are written as their documentation tells; TRL has to be
there: pip install -c constraints.txt trl
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import (
    ROOT,
    arguments,
    circumstances,
    peak_bytes,
    say,
    spread,
    wrapped,
    write,
)

COMMAND = "python benchmarks/preprocess.py"
MAX_SEQ_LEN = 2048
VOCABULARY = 32_000
TRAINED_ON = 8  # every eighth document
LOOK_S = 0.01
OURS = "VectorLM"
TARGETS = {  # least ratio over VectorLM's time
    ("byte-level", "tokenizers, a plain stream"): 8.0,
    ("byte-level", "datasets.map and group_texts"): 16.0,
    ("SentencePiece-like", "tokenizers, a plain stream"): 2.5,
    ("SentencePiece-like", "datasets.map and group_texts"): 5.0,
}
MOST_MEMORY_MB = 500.0


# --- what is read -----------------------------------------------------------------------


def documents() -> Iterator[str]:
    """The Python files installed here, ordered by a hash of their names."""
    root = Path(site.getsitepackages()[0])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200:
            yield text


def make_corpus(path: Path, most_bytes: int) -> int:
    """Documents until that many bytes are there; less where fewer files are installed."""
    count = size = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in documents():
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            count, size = count + 1, size + len(line.encode())
            if size >= most_bytes:
                break
    return count


def repeat(source: Path, times: int, path: Path) -> Path:
    with open(path, "wb") as file:
        for _ in range(times):
            with open(source, "rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
    return path


def make_tokenizer(kind: str, corpus: Path, folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        # Words alone, as a trainer needs them; the finished tokenizer has no such step.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    with open(corpus, encoding="utf-8") as file:
        texts = (json.loads(line)["text"] for i, line in enumerate(file) if i % TRAINED_ON == 0)
        tokenizer.train_from_iterator(texts, trainer)
    if kind != "byte-level":
        tokenizer.pre_tokenizer = None
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


# --- the contenders ---------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What a contender is given: files to read, and a folder of its own to write into."""

    corpus: Path
    tokenizer: Path
    out: Path


def ours(place: Place) -> list[str]:
    config = {
        "model": str(place.tokenizer),
        "train_parameters": {"output_dir": str(place.out / "run"), "max_seq_len": MAX_SEQ_LEN},
        "dataset": {"train_ds": str(place.out / "rows")},
        "dataset_preprocess": {
            "load_path": str(place.corpus),
            "save_path": str(place.out / "rows"),
            "packing_type": "full",
            "add_bos_eos_tokens": False,  # so that ids can be compared one by one
        },
    }
    file = place.out / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, str(ROOT / "preprocess_data.py"), "--config", str(file)]


PLAIN = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
corpus, tokenizer, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer + "/tokenizer.json")
with open(corpus, encoding="utf-8") as lines, open(out + "/ids", "wb") as ids:
    def flush(texts):
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            np.array(encoding.ids, np.int32).tofile(ids)
    texts, size = [], 0
    for line in lines:
        texts.append(json.loads(line)["text"])
        size += len(texts[-1])
        if size > 1 << 22:
            flush(texts)
            texts, size = [], 0
    flush(texts)
"""

TOKENIZED = """
import os, sys
corpus, tokenizer, out = sys.argv[1:]
os.environ["HF_DATASETS_CACHE"] = out + "/cache"
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
rows = load_dataset("json", data_files=corpus, split="train")
rows = rows.map(lambda r: tokenizer(r["text"], add_special_tokens=False, verbose=False),
                batched=True, remove_columns=rows.column_names)
"""

GROUPED = (
    TOKENIZED
    + f"""
from itertools import chain
def group_texts(batch):
    joined = {{key: list(chain(*batch[key])) for key in batch}}
    size = len(joined["input_ids"]) // {MAX_SEQ_LEN} * {MAX_SEQ_LEN}
    cut = {{key: [value[i : i + {MAX_SEQ_LEN}] for i in range(0, size, {MAX_SEQ_LEN})]
           for key, value in joined.items()}}
    cut["labels"] = cut["input_ids"].copy()
    return cut
rows.map(group_texts, batched=True).save_to_disk(out + "/rows")
"""
)

TRL = (
    TOKENIZED
    + f"""
from trl import pack_dataset
rows = rows.select_columns(["input_ids"])
pack_dataset(rows, {MAX_SEQ_LEN}, strategy="bfd").save_to_disk(out + "/rows")
"""
)


def script(text: str) -> Callable[[Place], list[str]]:
    return lambda place: [
        sys.executable,
        "-c",
        text,
        str(place.corpus),
        str(place.tokenizer),
        str(place.out),
    ]


CONTENDERS = {
    OURS: ours,
    "tokenizers, a plain stream": script(PLAIN),
    "datasets.map and group_texts": script(GROUPED),
    "TRL, best-fit packing": script(TRL),
}


# --- measuring --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    seconds: float
    memory_mb: float  # the most the process held at a time


def run(command: Sequence[str], log: Path) -> Run:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    environment["XDG_CACHE_HOME"] = str(log.parent / "cache")
    began = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    memory_mb = 0.0
    while process.poll() is None:
        memory_mb = peak_bytes(process.pid) / 1e6 or memory_mb
        time.sleep(LOOK_S)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)[:80]} ended with {process.returncode}:\n{log.read_text()}"
        )
    return Run(time.monotonic() - began, memory_mb)


def take_turn(name: str, place: Place, log: Path) -> Run:
    shutil.rmtree(place.out, ignore_errors=True)
    place.out.mkdir()
    return run(CONTENDERS[name](place), log)


def measure(folder: Path, corpus: Path, tokenizer: Path, rounds: int) -> dict[str, list[Run]]:
    names = [name for name in CONTENDERS if name != "TRL, best-fit packing" or find_spec("trl")]
    found: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            one = take_turn(name, Place(corpus, tokenizer, folder / "out"), folder / "log")
            found[name].append(one)
            say(f"round {number + 1}, {name}: {one.seconds:.2f} s, {one.memory_mb:,.0f} MB")
    return found


def same_ids(folder: Path, corpus: Path, tokenizer: Path) -> int:
    """The tokens of our rows, which must be those of the plain stream, one by one."""
    place = Place(corpus, tokenizer, folder / "out")
    take_turn("tokenizers, a plain stream", place, folder / "log")
    plain = np.fromfile(place.out / "ids", np.int32)
    take_turn(OURS, place, folder / "log")
    if not np.array_equal(plain, row_ids(place.out / "rows")):
        raise RuntimeError("VectorLM's ids are not those of the plain stream")
    return len(plain)


def row_ids(folder: Path) -> np.ndarray[Any, Any]:
    from vectorlm.data.store import open_rows

    column = open_rows(folder).column("input_ids")
    return np.concatenate([chunk.values.to_numpy() for chunk in column.chunks])


# --- telling ----------------------------------------------------------------------------


def table(kind: str, tokens: int, found: dict[str, list[Run]]) -> str:
    base = [one.seconds for one in found[OURS]]
    lines = [
        f"A {kind} tokenizer, {tokens / 1e6:.1f} M tokens:",
        "",
        "| | seconds | times VectorLM | tokens a second | MB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        seconds = [one.seconds for one in runs]
        ratios = [mine / ours for mine, ours in zip(seconds, base, strict=True)]
        lines.append(
            f"| {name} | {spread(seconds, '.2f')} | {spread(ratios, '.1f')} "
            f"| {tokens / median(seconds) / 1e6:.2f} M | {max(o.memory_mb for o in runs):,.0f} |"
        )
    return "\n".join(lines)


def failures(kind: str, found: dict[str, list[Run]]) -> list[str]:
    wrong = []
    for (of, name), least in TARGETS.items():
        if of == kind:
            pairs = zip(found[name], found[OURS], strict=True)
            ratio = median([other.seconds / mine.seconds for other, mine in pairs])
            if ratio < least:
                wrong.append(f"{kind}, {name}: {ratio:.1f} times, the aim is {least}")
    return wrong


def memory(folder: Path, corpus: Path, tokenizer: Path) -> tuple[str, list[str]]:
    place = Place(corpus, tokenizer, folder / "out")
    once = take_turn(OURS, place, folder / "log")
    large = repeat(corpus, 8, folder / "large.jsonl")
    often = take_turn(OURS, Place(large, tokenizer, folder / "out"), folder / "log")
    large.unlink()
    text = (
        f"Memory of VectorLM at its peak: {once.memory_mb:,.0f} MB with this corpus, "
        f"{often.memory_mb:,.0f} MB with eight times as much text ({often.seconds:.1f} s)."
    )
    most = max(once.memory_mb, often.memory_mb)
    wrong = [f"{most:,.0f} MB, the aim is {MOST_MEMORY_MB:,.0f}"] if most > MOST_MEMORY_MB else []
    return text, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(COMMAND, __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring, 5 unless told")
    parser.add_argument("--mb", type=int, default=100, help="size of the corpus")
    parser.add_argument("--chat", action="store_true", help="conversations instead of texts")
    parser.add_argument("--conversations", type=int, default=20_000, help="how many, with --chat")
    chosen = parser.parse_args(argv)
    if chosen.chat:
        from benchmarks import preprocess_chat

        return preprocess_chat.main(chosen.rounds, chosen.conversations, chosen.write)
    load = os.getloadavg()[0]
    told, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="vectorlm-preprocess-") as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        count = make_corpus(corpus, chosen.mb * 10**6)
        for kind in ("byte-level", "SentencePiece-like"):
            tokenizer = make_tokenizer(kind, corpus, folder / kind)
            cold = take_turn(OURS, Place(corpus, tokenizer, folder / "out"), folder / "log")
            tokens = same_ids(folder, corpus, tokenizer)
            found = measure(folder, corpus, tokenizer, chosen.rounds)
            told.append(table(kind, tokens, found))
            told.append(f"The first time that VectorLM meets this tokenizer: {cold.seconds:.2f} s.")
            wrong += failures(kind, found)
        text, problems = memory(folder, corpus, folder / "byte-level")
        size = corpus.stat().st_size / 1e6
    about = (
        f"{count:,} documents, {size:.1f} MB of JSONL; rows of {MAX_SEQ_LEN} tokens. A figure is "
        f"the median of {chosen.rounds} rounds (least-most); MB is the largest process's memory."
    )
    packages = ("fastokens", "tokenizers", "datasets", *(["trl"] if find_spec("trl") else []))
    text = "\n\n".join([circumstances(COMMAND, load, packages, about), *told, wrapped(text)])
    print(text)
    for problem in wrong + problems:
        say(problem)
    if chosen.write:
        write(COMMAND, text)
    return 1 if wrong or problems else 0


if __name__ == "__main__":
    sys.exit(main())
