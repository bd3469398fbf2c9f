"""Can conversations be rendered: is there a chat template, does it parse, do the first rows go
through it? Floor 1, called by `raw_data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vectorlm.chat.formats import FORMATS, TURNS, Conversation, column_names, parse
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.spans import Finder
from vectorlm.chat.template import KEY, find_template
from vectorlm.check.finding import Finding, Surroundings, error, warning
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.hub_cache import find_model
from vectorlm.tokenizer_files import added_tokens

SKIP = "mend it, or set dataset_preprocess.skip_bad_rows: true"


def look_at_chats(
    here: Surroundings,
    key: str,
    options: DatasetPreprocess,
    row_format: str,
    path: Path,
    fields: Sequence[str],
    first_rows: Sequence[tuple[int, Any]],
) -> Iterator[Finding]:
    names = column_names(row_format, options.columns)
    absent = [names[role] for role in FORMATS[row_format].required if names[role] not in fields]
    if absent:
        have = ", ".join(fields[:10]) or "none"
        yield error(
            "dataset_preprocess.dataset_format",
            f"{path} has no field {absent[0]!r}, which {row_format} needs; its fields: {have}",
            "take another dataset_format, or say with dataset_preprocess.columns which is which",
        )
        return
    if row_format not in TURNS:
        return
    try:
        finder = _finder(here, options)
    except DataError as problem:
        text, _, cure = str(problem).partition("\n")
        yield error(KEY, text.removeprefix(f"{KEY}: "), cure)
        return
    if finder is not None:
        kind = warning if options.skip_bad_rows else error
        for number, bad in islice(_problems(finder, options, row_format, first_rows), 1):
            yield kind(key, f"{path}:{number}: {bad}", SKIP)


def _finder(here: Surroundings, options: DatasetPreprocess) -> Finder | None:
    """None where there is no model to ask; others complain of that."""
    given = Path(here.config.model).expanduser()
    folder = given if given.is_dir() else find_model(here.config.model, here.environ)
    if folder is None and options.chat_template is None:
        return None
    template = find_template(options.chat_template, folder)
    tokens = added_tokens(folder) if folder else {}
    specials = [text for text, special in tokens.items() if special]
    finder = Finder(template, options.learn, [*specials, *template.special.values()], list(tokens))
    if tokens:  # without them, ends are not seen
        finder.check_template()
    return finder


def _problems(
    finder: Finder,
    options: DatasetPreprocess,
    row_format: str,
    first_rows: Sequence[tuple[int, Any]],
) -> Iterator[tuple[int, RowProblem]]:
    for number, row in first_rows:
        try:
            parsed = parse(row, row_format, options.columns)
            if isinstance(parsed, Conversation):
                finder.find(parsed)
        except RowProblem as problem:
            yield number, problem
