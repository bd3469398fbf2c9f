"""Templates render here as they do in transformers, and are found in the same places."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat.models import (
    NAMED,
    SOUND,
    TOOL,
    calls,
    model_folder,
    result,
    said,
    source,
    system,
    template,
    user,
)
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.template import TODAY, ChatTemplate, find_template, own_template, special_tokens
from vectorlm.errors import DataError

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "two turns": ([user("Hi <b> & 'you'"), said("Hello. "), user("More"), said("Sure")], None),
    "system": ([system("Be brief."), user("Hi"), said("Grüße 你好 🙂")], None),
    "thinking": ([user("a"), said("b", "because"), user("c"), said("d", "since")], None),
    "thinking inside": ([user("a"), said("<think>\nlong\n</think>\n\nb")], None),
    "tools": (
        [user("Rain?"), calls("weather", city="Köln", day=None), result("12"), said("No")],
        [TOOL],
    ),
    "asked last": ([user("Hi"), said("Hello"), user("More")], None),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_folder(tmp_path_factory.mktemp("model"), None), local_files_only=True
    )


@pytest.fixture
def on_that_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("name", [*SOUND, "hopeless"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.usefixtures("on_that_day")
def test_renders_as_transformers_does(name: str, kind: str, prompt: bool, tokenizer: Any) -> None:
    import jinja2

    messages, tools = CONVERSATIONS[kind]
    try:
        wanted = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=source(name),
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except jinja2.TemplateError as error:
        with pytest.raises(RowProblem, match=str(error)):
            template(name).render(messages, tools, prompt)
    else:
        assert template(name).render(messages, tools, prompt) == wanted


USES = {
    "json": "{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
    "separators": "{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}",
    "ascii": "{{ 'é' | tojson(ensure_ascii=true) }}",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}",
    "namespace": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}"
    "{% endfor %}{{ n.a }}{{ dict(a=2).a }}",
    "blocks": "{% if true %}\n  {% if true %}\n a\n  {% endif %}\n{% endif %}\nb\n",
    "marks": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ documents is none }}",
}


@pytest.mark.parametrize("use", USES)
def test_filters_and_functions_are_those_of_transformers(use: str, tokenizer: Any) -> None:
    messages = [user("<a>"), said("é")]
    wanted = tokenizer.apply_chat_template(messages, chat_template=USES[use], tokenize=False)
    assert ChatTemplate(USES[use], "here", NAMED).render(messages) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_do_refuses_the_row(text: str) -> None:
    with pytest.raises(RowProblem, match="the chat template refuses it: "):
        ChatTemplate(text, "here", NAMED).render([user("a")])


def test_a_broken_template_is_told_with_its_line() -> None:
    with pytest.raises(DataError, match=r"my.jinja: line 2: the chat template is broken: "):
        ChatTemplate("a\n{% for %}", "my.jinja", {})


def test_a_date_is_always_the_same() -> None:
    dated = template("llama31")
    assert dated.asks_for_the_date
    assert "26 Jul 2024" in dated.render([user("a")])
    assert not template("chatml").asks_for_the_date


def test_found_where_transformers_finds_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = model_folder(tmp_path / "model", "qwen3")
    assert own_template(folder) == (str(folder / "chat_template.jinja"), source("qwen3"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for given in (source("gemma"), [{"name": "default", "template": source("gemma")}]):
        text = json.dumps(settings | {"chat_template": given})
        (folder / "tokenizer_config.json").write_text(text)
        # The file of its own counts first.
        assert find_template(None, folder).source == source("qwen3")
    (folder / "chat_template.jinja").unlink()
    found = find_template(None, folder)
    assert found.source == source("gemma")
    assert found.special == special_tokens(folder) == NAMED
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert loaded.get_chat_template() == source("gemma")


def test_a_file_that_is_named_counts_before_the_models(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "qwen3")
    path = tmp_path / "mine.jinja"
    shutil.copy(Path(__file__).parents[2] / "configs/chatml.jinja", path)
    found = find_template(str(path), folder, {"eos_token": "<|im_end|>"})
    assert (found.source, found.name) == (source("configs/chatml"), str(path))
    assert found.special == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_no_template_is_told_with_the_key(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", None)
    with pytest.raises(DataError, match=r"has no chat template[\s\S]*chat_template, such as"):
        find_template(None, folder)
    with pytest.raises(DataError, match=r"chat_template: .*no.jinja cannot be read"):
        find_template(str(tmp_path / "no.jinja"), folder)
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="it is no UTF-8 text"):
        find_template(str(tmp_path / "bad.jinja"), folder)
