"""Rules about where rows come from and what they are: each broken once, and what is sound."""

from __future__ import annotations

from typing import Any

import pytest

from vectorlm.chat.formats import FORMATS
from vectorlm.config import checks
from vectorlm.config.data_checks import ROLES
from vectorlm.config.data_parts import parts_of
from vectorlm.config.problem import Problem
from vectorlm.config.schema import Config

Values = dict[str, Any]
SEVERAL: Values = {"load_path": None, "datasets": [{"load_path": "a.jsonl"}]}
EVAL = {"eval_save_path": "prepared_eval"}


def problems(**prepare: Any) -> list[Problem]:
    """Of a sound section with these changes; None takes a key out."""
    values = {"load_path": "raw", "save_path": "prepared"} | prepare
    section = {key: value for key, value in values.items() if value is not None}
    top = {
        "model": "model",
        "train_parameters": {"output_dir": "out", "max_seq_len": 128},
        "dataset_preprocess": section,
    }
    return checks.problems(Config.model_validate(top))


BROKEN: list[tuple[str, str, Values]] = [
    ("load_path", "missing; give load_path, or several sources", {"load_path": None}),
    ("load_path", "both say what to read", SEVERAL | {"load_path": "raw"}),
    ("split", "no effect with datasets", SEVERAL | {"split": "train"}),
    (
        "datasets",
        "entry 1 of the list: load_path is missing",
        {"load_path": None, "datasets": [{}]},
    ),
    (
        "datasets",
        "entry 2 of the list: wieght is an unknown key; allowed: .* did you mean weight?",
        SEVERAL | {"datasets": [{"load_path": "a"}, {"load_path": "b", "wieght": 2}]},
    ),
    (
        "datasets",
        "entry 1 of the list: weight is 0; input should be greater than 0",
        SEVERAL | {"datasets": [{"load_path": "a", "weight": 0}]},
    ),
    (
        "columns",
        "mesages is no role of a column; .* did you mean messages?",
        {"columns": {"mesages": "dialog"}},
    ),
    (
        "datasets",
        "question is no role of a column; the roles are messages, ",
        SEVERAL | {"datasets": [{"load_path": "a", "columns": {"question": "q"}}]},
    ),
    (
        "chat_template",
        "no effect on dataset_format text",
        {"dataset_format": "text", "chat_template": "a.jinja"},
    ),
    (
        "learn",
        "no meaning for dataset_format text",
        {"dataset_format": "text", "learn": "last_turn"},
    ),
    ("separator", "only for texts", {"dataset_format": "messages", "separator": "#"}),
    ("pre_pend", "only for texts", {"dataset_format": "tokenized", "pre_pend": "#"}),
    ("val_split", "needs eval_save_path", {"val_split": 0.1}),
    ("val_split", "keep one of the two", EVAL | {"val_split": 0.1, "eval_load_path": "other"}),
    ("val_split", "keep one of the two", EVAL | {"val_split": 0.1, "eval_split": "test"}),
    ("eval_save_path", "would be the training data", SEVERAL | EVAL),
    (
        "save_path",
        "datasets .*is it or lies in it",
        SEVERAL | {"datasets": [{"load_path": "prepared/a.jsonl"}]},
    ),
    ("from_disk", "keep one of the two", {"from_disk": True, "dataset_format": "jsonl"}),
]


@pytest.mark.parametrize(("key", "told", "prepare"), BROKEN)
def test_broken(key: str, told: str, prepare: Values) -> None:
    import re

    (problem,) = problems(**prepare)
    assert problem.keys[0] == f"dataset_preprocess.{key}"
    assert re.search(told, problem.message), problem.message


@pytest.mark.parametrize(
    "prepare",
    [
        SEVERAL,
        SEVERAL | EVAL | {"val_split": 0.5},
        SEVERAL | EVAL | {"eval_load_path": "other"},
        EVAL | {"val_split": 0.01},
        {"dataset_format": "messages", "columns": {"messages": "dialog", "tools": "functions"}},
        {"dataset_format": "sharegpt", "from_disk": True, "learn": "last_turn"},
        {"dataset_format": "text", "separator": "#", "learn": "all"},
        {"chat_template": "a.jinja", "learn": "all"},
    ],
)
def test_sound(prepare: Values) -> None:
    assert problems(**prepare) == []


def test_roles_are_those_of_the_formats() -> None:
    shapes = FORMATS.values()
    assert set(ROLES) == {role for shape in shapes for role in (*shape.required, *shape.optional)}


def test_parts_have_what_is_theirs_and_share_the_rest() -> None:
    top = {
        "model": "model",
        "train_parameters": {"output_dir": "out", "max_seq_len": 128},
        "dataset_preprocess": {
            "save_path": "prepared",
            "learn": "all",
            "datasets": [
                {"load_path": "a", "weight": 2, "columns": {"messages": "dialog"}},
                {"load_path": "b", "split": "train", "dataset_format": "alpaca"},
            ],
        },
    }
    prepare = Config.model_validate(top).dataset_preprocess
    assert prepare is not None
    (first, two), (second, one) = parts_of(prepare)
    assert (two, one) == (2, 1)
    assert (first.load_path, first.columns) == ("a", {"messages": "dialog"})
    assert (second.load_path, second.split, second.row_format) == ("b", "train", "alpaca")
    assert first.row_format is None
    assert first.learn == second.learn == "all"
    assert not first.datasets
