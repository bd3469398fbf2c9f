"""Is the prepared data there, whole, and made for this run? Where it is not prepared yet: can it
be? Floor 1, called by `everything`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from vectorlm import recipe
from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.check.model_files import Broken
from vectorlm.check.raw_data import changed_since, gone_sources, look_at_sources, sources
from vectorlm.config.schema import DatasetConfig, DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.manifest import MANIFEST_NAME, Manifest, read_manifest
from vectorlm.tokenizer_files import BY_CONTENT


def look(here: Surroundings) -> Iterator[Finding]:
    data, prepare = here.config.dataset, here.config.dataset_preprocess
    made = {source.save_path for source in sources(prepare)} if prepare else set()
    absent = False
    for key, path in _folders(here):
        absent = absent or not _is_prepared(path)
        if not (here.prepares and any(_same(path, other) for other in made)):
            yield from _folder(here, key, path)
    if data and data.eval_ds is not None and _same(data.eval_ds, data.train_ds):
        yield warning(
            "dataset.eval_ds",
            "is the training data, so the evaluation loss says nothing about new text",
            "give other data, or leave eval_ds out",
        )
    if prepare is not None:
        if data is not None:
            yield from _other_folders(here, data, prepare)
        if data is None or absent or here.prepares:
            yield from look_at_sources(here, prepare)
        if not here.prepares:
            yield from gone_sources(here, prepare)
    if data is None and here.config.slurm is not None:
        text = "the section is missing, and the job that slurm describes trains"
        yield error("dataset", text, "give dataset, with at least train_ds")


def _folders(here: Surroundings) -> Iterator[tuple[str, str]]:
    data = here.config.dataset
    if data is not None:
        yield "dataset.train_ds", data.train_ds
        if data.eval_ds is not None:
            yield "dataset.eval_ds", data.eval_ds


def _is_prepared(path: str) -> bool:
    return (Path(os.path.expanduser(path)) / MANIFEST_NAME).exists()


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _other_folders(
    here: Surroundings, data: DatasetConfig, prepare: DatasetPreprocess
) -> Iterator[Finding]:
    """Prepared data that the run does not read: it would train on what was prepared otherwise."""
    sweep = here.config.sweep
    varied = {*sweep.grid, *chain(*sweep.runs)} if sweep else set()
    pairs = (
        ("train_ds", data.train_ds, "save_path", prepare.save_path),
        ("eval_ds", data.eval_ds, "eval_save_path", prepare.eval_save_path),
    )
    for name, used, made_by, made in pairs:
        key, other = f"dataset.{name}", f"dataset_preprocess.{made_by}"
        if made is None or key in varied:
            continue
        if used is None:
            text = f"evaluation data is prepared in {made} ({other}), and the run evaluates nothing"
            yield note(key, text, f"set {key}: {made}")
        elif name == "eval_ds" and _same(used, data.train_ds):
            continue  # said already
        # What is not prepared is an error, which names the paths.
        elif not _same(used, made) and (_is_prepared(used) or here.prepares):
            yield warning(
                key,
                f"is {used}, and {other} is {made}: the run reads other data than "
                "vectorlm preprocess writes",
                f"set both to one folder, or take out {other} if the data was prepared otherwise",
            )


# --- a folder -------------------------------------------------------------------------------------


def _folder(here: Surroundings, key: str, path: str) -> Iterator[Finding]:
    folder = Path(path)
    if not _is_prepared(path):
        yield _not_prepared(here, key, folder)
        return
    cure = f"delete {path} and prepare it anew: {_prepare(here)}"
    try:
        manifest = read_manifest(folder)
    except DataError as problem:
        text, _, more = str(problem).partition("\n")
        yield error(key, text, more or cure)
        return
    yield from _rows(key, folder, manifest, cure)
    yield from _made_for(here, key, manifest)
    yield from _other_options(here, key, path, manifest)
    if key == "dataset.train_ds":
        yield from _enough(here, manifest)


def _prepare(here: Surroundings) -> str:
    return here.command("preprocess")


def _not_prepared(here: Surroundings, key: str, folder: Path) -> Finding:
    prepare = here.config.dataset_preprocess
    made = [p for p in (prepare.save_path, prepare.eval_save_path) if p] if prepare else []
    if folder.is_dir() and any(folder.iterdir()):
        text = f"{folder} is no prepared data (it has no {MANIFEST_NAME})"
        return error(key, text, f"give the folder that preprocessing wrote; {_prepare(here)}")
    if any(_same(path, str(folder)) for path in made):
        return warning(
            key,
            f"{folder} is {'empty' if folder.is_dir() else 'not prepared yet'}",
            f"{_prepare(here)}, or vectorlm submit --with-preprocess",
        )
    if folder.exists() and not folder.is_dir():
        text = f"{folder} is a file, not a folder of prepared data"
    else:
        text = f"there is no prepared data in {folder}"
    if prepare is None:
        return error(key, text, "prepare it: give dataset_preprocess, and run vectorlm preprocess")
    return error(
        key, text, f"dataset_preprocess writes to {' and '.join(made)}; give that, or mend the path"
    )


def _rows(key: str, folder: Path, manifest: Manifest, cure: str) -> Iterator[Finding]:
    if manifest.rows == 0:
        yield error(key, f"{folder} holds no rows", "prepare it from a source that is not empty")
        return
    if manifest.supervised_tokens == 0:
        yield error(
            key,
            f"{folder} holds no token that is learned",
            "look at dataset_preprocess.separator, and prepare it anew",
        )
    try:
        rows = _count_rows(folder)
    except Broken as problem:
        yield error(key, str(problem), cure)
        return
    if rows != manifest.rows:
        text = f"{folder} holds {rows:,} rows, and its manifest says {manifest.rows:,}"
        yield error(key, text, cure)


def _count_rows(folder: Path) -> int:
    """By the heads of the Arrow files' batches; Broken where one is missing or cut off."""
    import pyarrow as pa

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise Broken(f"{folder / 'state.json'} cannot be read ({problem})") from problem
    rows = 0
    for name in names:
        try:
            with pa.memory_map(str(folder / name)) as file:
                rows += sum(batch.num_rows for batch in pa.ipc.open_stream(file))
        except (OSError, pa.ArrowException) as problem:
            reason = problem.strerror if getattr(problem, "strerror", None) else problem
            raise Broken(f"{folder / name} cannot be read ({reason})") from problem
    return rows


# --- does it fit this run -------------------------------------------------------------------------


def _made_for(here: Surroundings, key: str, manifest: Manifest) -> Iterator[Finding]:
    assert here.config.dataset is not None
    asked = {
        "max_seq_len": (manifest.max_seq_len, here.config.train_parameters.max_seq_len),
        "ignore_index": (manifest.ignore_index, here.config.dataset.ignore_index),
    }
    for name, (prepared, wanted) in asked.items():
        if prepared != wanted:
            yield error(
                key,
                f"was prepared with {name} {prepared}, and the configuration says {wanted}",
                f"set it to {prepared}, or prepare the data again: {_prepare(here)}",
            )
    yield from _tokenizer(here, key, manifest)


def _tokenizer(here: Surroundings, key: str, manifest: Manifest) -> Iterator[Finding]:
    model = here.model
    if model is None:
        return
    try:
        tokenizer = model.tokenizer
    except Broken:
        tokenizer = None  # said of the model
    made, now = manifest.tokenizer_file_sha256, tokenizer.sha256 if tokenizer else None
    if made and now and made != now:
        # Of a large file only the bytes are compared, and other bytes may mean the same.
        kind = error if made.startswith(BY_CONTENT) and now.startswith(BY_CONTENT) else warning
        text = f"was prepared with another tokenizer than that of {here.config.model}"
        yield kind(key, text, f"prepare it again: {_prepare(here)}")
    size = model.vocab_size
    if size is not None and manifest.max_token_id >= size:
        yield error(
            key,
            f"holds token {manifest.max_token_id}, and {here.config.model} has a vocabulary of "
            f"{size}",
            "prepare it with the model's own tokenizer, or resize the model's embeddings",
        )


def _other_options(
    here: Surroundings, key: str, path: str, manifest: Manifest
) -> Iterator[Finding]:
    """What training refuses, and what it cannot see: that a source has changed since."""
    prepare = here.config.dataset_preprocess
    if prepare is None or not manifest.options:
        return
    changed = recipe.changed_since(here.planned if here.model else here.config, path, manifest)
    if changed:
        yield error(
            key,
            "was prepared otherwise than dataset_preprocess says now: " + "; ".join(changed),
            f"prepare it again, or set that back: {_prepare(here)}",
        )
        return
    made_by = [source for source in sources(prepare) if _same(source.save_path, path)]
    newer = changed_since(manifest, made_by) if made_by else None
    if newer:
        yield warning(
            key,
            f"its source has changed since it was prepared ({newer})",
            f"prepare it again: {_prepare(here)}",
        )


def _enough(here: Surroundings, manifest: Manifest) -> Iterator[Finding]:
    data, train = here.config.dataset, here.config.train_parameters
    if data is None or not manifest.rows:
        return
    ranks = here.ranks or 1  # at least
    batch = data.train_bs * train.gradient_accumulation_steps * ranks
    sizes = (
        f"{'1 rank' if ranks == 1 else f'{ranks} ranks'} x train_bs {data.train_bs} x "
        f"gradient_accumulation_steps {train.gradient_accumulation_steps}"
    )
    cure = (
        "lower dataset.train_bs or train_parameters.gradient_accumulation_steps, or use fewer GPUs"
    )
    where = "dataset.train_bs"
    if manifest.rows < ranks:
        text = f"{manifest.rows:,} rows for {ranks} ranks: some would have nothing to learn"
        yield warning("dataset.train_ds", text, "use fewer GPUs, or prepare more data")
    elif manifest.rows < batch:
        text = f"a step takes {batch:,} rows ({sizes}), and there are {manifest.rows:,} in all"
        yield warning(where, f"{text}: an epoch is a single step", cure)
