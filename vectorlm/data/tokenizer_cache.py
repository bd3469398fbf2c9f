"""What transformers made of a model folder's tokenizer files, kept so that the next start needs no
transformers. Floor 2; called by `data.tokenize`.

One private file an entry, under $XDG_CACHE_HOME or ~/.cache. Its name is a hash of the tokenizer
files' contents and of the libraries' versions, so nothing in it can be out of date; its first line
says what follows, and with which hash. It is a convenience: what cannot be read or written is as if
it were absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

FORMAT = 1
KEPT = 8
# Of a model folder, what a tokenizer can be made from.
SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".vocab")
WEIGHTS_INDEX = ".index.json"
LARGEST_BYTES = 256 << 20
LIBRARIES = ("transformers", "tokenizers")


@dataclass(frozen=True)
class Resolved:
    """A tokenizer as transformers resolves it; `serialized` is its `tokenizers` backend, None where
    it has none."""

    serialized: str | None
    bos_id: int | None
    eos_id: int | None
    bos: str | None
    eos: str | None
    sha256: str
    file_sha256: str | None
    splits_special: bool
    special: dict[str, str]  # by their names, as chat templates write them


def entry_path(model_folder: Path) -> Path | None:
    """Where the entry of this folder's tokenizer is, or would be; None if it cannot be told."""
    try:
        files = sorted(path for path in model_folder.iterdir() if makes_tokenizer(path))
        if sum(path.stat().st_size for path in files) > LARGEST_BYTES:
            return None
        parts = [[p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
        key = json.dumps([FORMAT, library_versions(), parts])
        return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.tokenizer"
    except (OSError, RuntimeError, ValueError):  # RuntimeError: there is no home
        return None


def makes_tokenizer(path: Path) -> bool:
    named = path.suffix in SUFFIXES and not path.name.endswith(WEIGHTS_INDEX)
    return named and path.is_file()


def library_versions() -> list[str]:
    """From the names of the installed packages' papers: to read them takes longer."""
    versions = []
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"{name} is not installed")
        place = Path(spec.origin)
        papers = sorted(path.name for path in place.parents[1].glob(f"{name}-*.dist-info"))
        versions += papers or [str(place), str(place.stat().st_mtime_ns)]
    return versions


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vectorlm" / "tokenizers"


def read_entry(path: Path) -> Resolved | None:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            if not is_private(os.fstat(file.fileno())):
                return None
            facts = json.loads(file.readline())
            body = file.read()
        if facts.pop("body_sha256") != hashlib.sha256(body).hexdigest():
            return None
        os.utime(path)
        return Resolved(serialized=body.decode(), **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_private(state: os.stat_result) -> bool:
    """Nobody else can have written it: what stands in it decides every token."""
    return state.st_uid == os.getuid() and not stat.S_IMODE(state.st_mode) & 0o077


def write_entry(path: Path, resolved: Resolved) -> None:
    if resolved.serialized is None:
        return
    facts = asdict(resolved)
    body = facts.pop("serialized").encode()
    head = json.dumps(facts | {"body_sha256": hashlib.sha256(body).hexdigest()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        make_private(path.parent)
        try:
            with open(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(head.encode() + b"\n" + body)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        forget_oldest(path.parent)


def make_private(folder: Path) -> None:
    for each in (folder.parent.parent, folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True, parents=True)
    os.chmod(folder, 0o700)


def forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.tokenizer"), key=lambda path: path.stat().st_mtime)
    for path in entries[:-KEPT]:
        path.unlink(missing_ok=True)
