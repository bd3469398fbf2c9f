"""Rules of `dataset_preprocess` about where rows come from and what they are. Floor 0; `checks`
runs them with the others."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from vectorlm.config.data_parts import DatasetSource
from vectorlm.config.problem import Problem
from vectorlm.config.schema import Config, DatasetPreprocess

PREFIX = "dataset_preprocess."
# What a column may be, over all formats of rows.
ROLES = (
    "messages",
    "conversations",
    "tools",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "input_ids",
    "labels",
    "loss_mask",
    "attention_mask",
)


def source_rules(config: Config) -> Iterator[Problem]:
    prepare = config.dataset_preprocess
    if prepare is not None:
        for rule in RULES:
            yield from rule(prepare)


def _one_source(prepare: DatasetPreprocess) -> Iterator[Problem]:
    keys = (PREFIX + "load_path", PREFIX + "datasets")
    if not prepare.load_path and not prepare.datasets:
        yield Problem(keys, "missing; give load_path, or several sources as datasets")
    elif prepare.load_path and prepare.datasets:
        yield Problem(keys, "load_path and datasets both say what to read; keep one of the two")
    elif prepare.datasets and prepare.split is not None:
        yield Problem(
            (PREFIX + "split", PREFIX + "datasets"),
            "has no effect with datasets; give each of them its own split",
        )


def _datasets(prepare: DatasetPreprocess) -> Iterator[Problem]:
    for number, entry in enumerate(prepare.datasets, start=1):
        try:
            DatasetSource.model_validate(entry)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            yield Problem(
                (PREFIX + "datasets",), f"entry {number} of the list: {_wrong(entry, first)}"
            )


def _wrong(entry: dict[str, object], error: object) -> str:
    assert isinstance(error, dict)
    names = list(DatasetSource.model_fields)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{key} is an unknown key; allowed: {', '.join(names)}{hint}"
    return f"{key} is {error['input']!r}; {str(error['msg']).lower()}"


def _columns(prepare: DatasetPreprocess) -> Iterator[Problem]:
    entries = [entry.get("columns") for entry in prepare.datasets]
    given: list[object] = [prepare.columns, *entries]
    for columns in given:
        unknown = (
            [role for role in columns if role not in ROLES] if isinstance(columns, dict) else []
        )
        for role in unknown:
            close = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            where = "columns" if columns is prepare.columns else "datasets"
            yield Problem(
                (PREFIX + where,),
                f"{role} is no role of a column; the roles are {', '.join(ROLES)}{hint}",
            )


def _text_alone(prepare: DatasetPreprocess) -> Iterator[Problem]:
    """Keys that only one kind of rows knows, where the format is named and is another."""
    if prepare.row_format is None or prepare.datasets:
        return
    if prepare.row_format == "text":
        if prepare.chat_template is not None:
            yield Problem(
                (PREFIX + "chat_template", PREFIX + "dataset_format"),
                "has no effect on dataset_format text; remove one of the two",
            )
        if prepare.learn == "last_turn":
            yield Problem(
                (PREFIX + "learn", PREFIX + "dataset_format"),
                "last_turn has no meaning for dataset_format text; remove one of the two",
            )
        return
    for name in ("pre_pend", "separator"):
        if getattr(prepare, name) is not None:
            yield Problem(
                (PREFIX + name, PREFIX + "dataset_format"),
                f"is only for texts, and dataset_format is {prepare.row_format}; remove it",
            )


def _held_out(prepare: DatasetPreprocess) -> Iterator[Problem]:
    if prepare.val_split is None:
        return
    if prepare.eval_save_path is None:
        yield Problem(
            (PREFIX + "val_split", PREFIX + "eval_save_path"),
            "needs eval_save_path, the folder for the rows that are held out",
        )
    for name in ("eval_load_path", "eval_split"):
        if getattr(prepare, name) is not None:
            yield Problem(
                (PREFIX + "val_split", PREFIX + name),
                f"val_split takes the evaluation data from the training data, {name} from "
                "elsewhere; keep one of the two",
            )


def _evaluation_source(prepare: DatasetPreprocess) -> Iterator[Problem]:
    if prepare.eval_save_path is None:
        for name in ("eval_load_path", "eval_split"):
            if getattr(prepare, name) is not None:
                yield Problem(
                    (f"{PREFIX}{name}", PREFIX + "eval_save_path"),
                    "has no effect without eval_save_path; give that too, or remove this",
                )
    elif prepare.val_split is None and _evaluates_on_training_data(prepare):
        yield Problem(
            tuple(
                PREFIX + name
                for name in ("eval_save_path", "eval_load_path", "eval_split", "val_split")
            ),
            "the evaluation data would be the training data; give another eval_load_path or "
            "eval_split, or hold rows out with val_split",
        )


def _evaluates_on_training_data(prepare: DatasetPreprocess) -> bool:
    if prepare.datasets and prepare.eval_load_path is None:
        return True
    source = posixpath.normpath(prepare.eval_load_path or prepare.load_path)
    same = source == posixpath.normpath(prepare.load_path)
    return same and prepare.eval_split in (None, prepare.split)


RULES: tuple[Callable[[DatasetPreprocess], Iterator[Problem]], ...] = (
    _one_source,
    _datasets,
    _columns,
    _text_alone,
    _held_out,
    _evaluation_source,
)
