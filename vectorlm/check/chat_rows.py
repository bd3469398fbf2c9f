"""Can conversations be rendered: is there a chat template, does it parse, do the first rows go
through it? Floor 1, called by `raw_data`. What renders is what preprocessing renders with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vectorlm.chat.formats import FORMATS, TURNS, column_names
from vectorlm.chat.problem import OF_THE_TEMPLATE, RowProblem
from vectorlm.chat.renderer import Recipe, Refused, Renderer, oddities
from vectorlm.chat.template import KEY, template_or_why_not
from vectorlm.check.finding import Finding, Surroundings, error, warning
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.tokenizer_files import added_tokens

SKIP = "mend it, or set dataset_preprocess.skip_bad_rows: true"
OTHER_TEMPLATE = (
    f"name another template with {KEY}, such as configs/chatml.jinja; or mend the row, or set "
    "dataset_preprocess.skip_bad_rows: true"
)

Rows = Sequence[tuple[str, Any]]  # where, and the record


def look_at_chats(
    here: Surroundings,
    key: str,
    options: DatasetPreprocess,
    row_format: str,
    fields: Sequence[str],
    rows: Rows,
    nulls: bool,
) -> Iterator[Finding]:
    names = column_names(row_format, options.columns)
    absent = [names[role] for role in FORMATS[row_format].required if names[role] not in fields]
    if absent:
        have = ", ".join(fields[:10]) or "none"
        yield error(
            "dataset_preprocess.dataset_format",
            f"{rows[0][0]} has no field {absent[0]!r}, which {row_format} needs; its fields: "
            f"{have}",
            "take another dataset_format, or say with dataset_preprocess.columns which is which",
        )
        return
    folder = here.model_folder
    try:
        renderer, has_tokens = _renderer(options, row_format, folder, nulls)
        if row_format in TURNS:
            if folder is None and options.chat_template is None:
                return  # others complain that there is no model to ask
            if has_tokens:  # without them, ends are not seen
                renderer.finder.check_template()
        bad = next(_problems(renderer, rows), None)
        odd = list(oddities(renderer, [row for _, row in rows])) if row_format in TURNS else []
    except DataError as problem:
        text, _, cure = str(problem).partition("\n")
        yield error(KEY, text.removeprefix(f"{KEY}: "), cure)
        return
    if bad is not None:
        where, why = bad
        cure = OTHER_TEMPLATE if why.reason in OF_THE_TEMPLATE else SKIP
        yield (warning if options.skip_bad_rows else error)(key, f"{where}: {why.detail}", cure)
    for text in odd:
        yield warning(KEY, text, f"name a template that fits with {KEY}, see docs/chat.md")


def _renderer(
    options: DatasetPreprocess, row_format: str, folder: Path | None, nulls: bool
) -> tuple[Renderer, bool]:
    """And whether the tokenizer's special tokens are known."""
    tokens = added_tokens(folder) if folder else {}
    template = template_or_why_not(options.chat_template, folder)
    specials = [text for text, special in tokens.items() if special]
    if not isinstance(template, str):
        specials += template[2].values()
    recipe = Recipe(
        row_format,
        options.columns,
        nulls,
        options.learn,
        None,
        None,
        None,
        template,
        specials,
        list(tokens),
    )
    return Renderer(recipe), bool(tokens)


def _problems(renderer: Renderer, rows: Rows) -> Iterator[tuple[str, Refused]]:
    for where, row in rows:
        if renderer.recipe.row_format != "tokenized":
            yield from ((where, one) for one in renderer.render([row]) if isinstance(one, Refused))
            continue
        try:
            renderer.parsed(row)
        except RowProblem as problem:
            yield where, Refused(problem.reason, problem.detail)
