"""A model's chat template: where it is found, and rendering it without transformers. Floor 1;
called by `vectorlm.data.chat.encoder` and `vectorlm.check`.

Templates come from the hub, so they run in jinja's sandbox, with the settings, filters and
functions that transformers gives them; tests hold both to the same text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vectorlm.chat.problem import REFUSED, RowProblem
from vectorlm.errors import DataError

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
KEY = "dataset_preprocess.chat_template"
# What templates that write a date fall back to themselves; any day of its own would make the
# prepared rows depend on when they were prepared.
TODAY = datetime.datetime(2024, 7, 26)

MOST_KNOWN = 1000

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """A compiled template; `name` says in messages where it is from."""

    def __init__(self, source: str, name: str, special: Mapping[str, str]) -> None:
        self.source = source
        self.name = name
        self.special = dict(special)
        try:
            self.compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{name}: line {error.lineno}: the chat template is broken: {error.message}.\n"
                f"Mend it, or name another file with {KEY}."
            ) from error

    @property
    def asks_for_the_date(self) -> bool:
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = False,
    ) -> str:
        """`prompt`: with what makes the model answer at the end, if the template has that."""
        try:
            return self.compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.special,
            )
        # A template is a program of somebody else's, and fails in all the ways a program can.
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[0] if text else type(error).__name__
            raise RowProblem(REFUSED, f"the chat template refuses it: {reason}") from error


# --- the environment ------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; its contents are written as they are."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own class has it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Keeps templates from writing what Python itself looks up on an object."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *rest = given
        Namespace.__init__(self)
        for name, value in dict(*rest, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")
        super().__setitem__(name, value)


DICT_NAMES = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, with the same answers in less time: most of a rendering is looking up
    attributes, and whether one is safe depends on nothing but the object's type and the name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.safe: dict[tuple[type, str], bool] = {}

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is not dict or attribute in DICT_NAMES:
            return super().getattr(obj, attribute)
        if attribute in obj:
            return obj[attribute]
        return self.undefined(obj=obj, name=attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        found = self.safe.get((type(obj), attr))
        if found is None:
            found = super().is_safe_attribute(obj, attr, value)
            if len(self.safe) < MOST_KNOWN:  # names may come from the data
                self.safe[type(obj), attr] = found
        return found


class _Dictionaries:
    """`dict`, and nothing else of it."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


def _environment() -> ImmutableSandboxedEnvironment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise,
        "strftime_now": TODAY.strftime,
        "namespace": _Namespace,
        "dict": _Dictionaries(),
    }
    made.globals.update(functions)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


# --- the model's files ----------------------------------------------------------------------------


def find_template(
    chat_template: str | None, folder: Path | None, special: Mapping[str, str] | None = None
) -> ChatTemplate:
    """The file that the configuration names, else the model's own; a DataError if there is none.

    `special`: special tokens by their names, where more is known than the folder's files say.
    """
    known = special_tokens(folder) | dict(special or {})
    if chat_template is not None:
        return ChatTemplate(_read(Path(chat_template).expanduser()), chat_template, known)
    found = own_template(folder) if folder else None
    if found is None:
        raise DataError(
            f"model: the data holds conversations, but {folder or 'the model'} has no chat "
            "template, as models that are not tuned for chat.\n"
            f"Name a file that holds one with {KEY}, such as configs/chatml.jinja, or take the "
            "tuned model."
        )
    name, source = found
    return ChatTemplate(source, name, known)


def template_or_why_not(
    chat_template: str | None, folder: Path | None, special: Mapping[str, str] | None = None
) -> tuple[str, str, dict[str, str]] | str:
    """Source, name and special tokens, or what is wrong: values for another process."""
    try:
        found = find_template(chat_template, folder, special)
    except DataError as problem:
        return str(problem)
    return found.source, found.name, found.special


def own_template(folder: Path) -> tuple[str, str] | None:
    """(where, template) as transformers chooses: the file of its own before the settings."""
    if (folder / FILE).is_file():
        return str(folder / FILE), _read(folder / FILE)
    given = _settings(folder / SETTINGS).get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in given}
        given = named.get("default")
    return (str(folder / SETTINGS), given) if isinstance(given, str) else None


def special_tokens(folder: Path | None) -> dict[str, str]:
    """What templates may write by name, such as bos_token."""
    found: dict[str, str] = {}
    for name in (SPECIAL_MAP, SETTINGS) if folder else ():
        for key, value in _settings(Path(str(folder)) / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key in SPECIAL_NAMES and isinstance(text, str):
                found[key] = text
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads the tokenizer complains
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(
            f"{KEY}: {path} cannot be read ({reason}).\n"
            "It must name a file that holds a chat template in jinja."
        ) from error
