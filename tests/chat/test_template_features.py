"""What chat templates of the families that are tuned most use of jinja, as far as it was seen in
them: each renders here to what transformers renders, or is refused where that fails.

The templates are written for these tests, one feature each.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tests.data.chat.models import NAMED, TOOL, calls, result, said, system, user
from vectorlm.chat.formats import Conversation, parse
from vectorlm.chat.template import TODAY, ChatTemplate

PARAMETERS = {
    "type": "object",
    "required": ["city", "days"],
    "properties": {
        "days": {"type": ["integer", "null"], "default": 1.5, "enum": [1, 2.0, True, None]},
        "city": {"type": "string", "description": 'Where? "Köln" & <such>\n'},
    },
}
FUNCTION = {"name": "rain", "description": "Tells.", "parameters": PARAMETERS, "return": {"a": 1}}
TOOLS = [TOOL, {"type": "function", "function": FUNCTION}]
MESSAGES = [
    system(" Be 'brief'. "),
    user("Hi <b>&amp;</b>"),
    said("<think>\nlong\n</think>\n\nHello. ", "because"),
    user("Rain?\n"),
    calls("rain", "Let me see", city="Köln", days=2, more={"b": [1, None], "a": 'x"y'}),
    result('{"mm": 12}') | {"name": "rain", "tool_call_id": "abcdef123"},
    said("No, 100 %."),
    user("Grüße 🙂"),
    said("Bye", "since"),
]


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return TODAY


@pytest.fixture(autouse=True)
def on_that_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def theirs(text: str, messages: Any, tools: Any, prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    (found,), _ = render_jinja_template(
        [messages], tools=tools, chat_template=text, add_generation_prompt=prompt, **NAMED
    )
    return str(found)


def agree(text: str, messages: Any = MESSAGES, tools: Any = TOOLS) -> str | None:
    """What both render; None where both refuse."""
    found = None
    for prompt in (False, True):
        here = outcome(ours, text, messages, tools, prompt)
        there = outcome(theirs, text, messages, tools, prompt)
        found = here[0]
        assert found == there[0]
        # How a name is forbidden is said in our own words.
        assert here[1] in there[1] or "namespace" in here[1]
    return found


def ours(text: str, messages: Any, tools: Any, prompt: bool) -> str:
    return ChatTemplate(text, "here", NAMED).render(messages, tools, prompt)


def outcome(render: Callable[..., str], *given: Any) -> tuple[str | None, str]:
    """The text, or why there is none: a template may fail in any way."""
    try:
        return render(*given), ""
    except Exception as error:
        return None, str(error).removeprefix("the chat template refuses it: ")


EACH = "{%- for message in messages %}"
END = "{%- endfor %}"
FEATURES = {
    # --- what transformers adds ---
    "the date, where it can be had": "{% if strftime_now is defined %}"
    "{{ strftime_now('%d %b %Y') }}"
    "{{ strftime_now('%Y-%m-%d %A %H:%M') }}{% endif %}",
    "a date given from outside": "{{ date_string if date_string is defined else 'none' }}",
    "JSON": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}"
    "{{ messages | tojson(sort_keys=true) }}",
    "JSON, of every kind": "{{ tools | tojson(separators=(',', ':')) }}"
    "{{ tools | tojson(sort_keys=true, ensure_ascii=True, indent=2) }}"
    "{{ 'a<b>&é' | tojson }}{{ none | tojson }}{{ true | tojson }}{{ 1.0 | tojson }}"
    "{{ (1, 2) | tojson }}{{ 'x' | tojson | length }}",
    "JSON, cut": "{{ (tools[0].function | tojson)[:-1] + ', \"id\": 1}' }}",
    "dictionaries made": "{{ dict(a=1, b='x') }}{{ dict.fromkeys(['a', 'b'], 0) }}"
    "{{ dict([('a', 1)], c=2).items() | list }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ pad_token }}",
    "documents": "{{ documents is none }}{{ documents is defined }}",
    "prompt asked for": "{% if add_generation_prompt is defined and add_generation_prompt %}P"
    "{% endif %}{{ enable_thinking is defined }}{{ enable_thinking | default(false) }}",
    # --- messages ---
    "a system message set aside": "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] | trim + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{{ message['role'] }}:"
    "{{ (first if loop.first else '') + message['content'] | trim }};{% endfor %}",
    "kinds of contents": EACH
    + "{%- if message.content is string %}s{%- elif message.content is iterable %}i{%- endif %}"
    "{{ message.content is mapping }}{{ message.content is sequence }}"
    "{{ message['content'] is none }}{{ message.tool_calls is defined }}"
    "{{ 'tool_calls' in message }}{{ message.get('name', '-') }}{{ message.items() | length }}"
    + END,
    "thinking taken out": EACH
    + "{%- set content = message.content %}{%- if '</think>' in content %}"
    "{%- set thought = "
    "content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}({{ thought }}){%- endif %}"
    "{%- if message.reasoning_content is string %}[{{ message.reasoning_content.strip('\n') }}]"
    "{%- endif %}{{ message.thinking is defined }}{{ content }};" + END,
    "the last question looked for": "{%- set ns = namespace(looking=true, "
    "last=messages|length-1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.looking and message.role == 'user' and not (message.content.startswith('<tool>') "
    "and message.content.endswith('</tool>')) %}{%- set ns.looking = false %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}{{ ns.last }}{{ ns.looking }}",
    "messages chosen": "{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content }}"
    "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | "
    "join(',') }}"
    "{{ messages | selectattr('tool_calls', 'defined') | list | length }}"
    "{{ messages | map(attribute='name', default='-') | unique | sort | list }}"
    "{{ (messages | first).role }}{{ (messages | last).role }}{{ messages[-1] == messages | last }}"
    "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}",
    "lists put together": "{% set kept = [] %}"
    + EACH
    + "{%- set kept = kept + [message] %}{{ kept | length }}"
    + END
    + "{{ kept | length }}{{ [1, 2] + [3] }}{{ 2 in [1, 2] }}{{ (1, 2)[0] }}",
    "neighbours": EACH + "{{ loop.previtem.role if loop.previtem is defined else '^' }}"
    "{{ loop.nextitem.role if not loop.last else '$' }}{{ loop.changed(message.role) }}"
    "{{ messages[loop.index0 - 1].role }}{{ loop.cycle('a', 'b') }}{{ loop.revindex }};" + END,
    # --- tools ---
    "tools or none": "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{{ tools is not none }}{{ tools is iterable and tools | length > 0 }}",
    "tools by their keys": "{% for tool in tools %}{% set tool = tool.function %}"
    "{% for key, val in tool.items() if key != 'return' %}{{ key }}:"
    "{{ val if val is string else val | tojson }}{{ ', ' if not loop.last }}{% endfor %}"
    "{% endfor %}",
    "parameters sorted": "{% for key, val in tools[1].function.parameters.properties | dictsort %}"
    "{{ key }}{{ val.type if val.type is string else val.type | map('upper') | join('|') }}"
    "{{ val['default'] is number }}{{ val.default is float }}{{ val.enum is boolean }}"
    "{{ val['enum'] | default([]) | string }}{% endfor %}",
    "arguments": EACH + "{%- for call in message.tool_calls or [] %}{%- if call.function %}"
    "{%- set call = call.function %}{%- endif %}{{ call.name }}("
    "{%- for name, value in call.arguments | items %}{{ name }}="
    "{{ value | tojson if value is mapping or (value is sequence and value is not string) "
    "else value | string }}{{ ',' if not loop.last }}{%- endfor %})"
    "{{ call.arguments is mapping }}{{ call.arguments['city'] }}{{ call['name'] | upper }}"
    "{%- endfor %}" + END,
    "built-in tools": "{% if builtin_tools is defined or tools is not none %}"
    "{{ ['a', 'b'] | reject('equalto', 'a') | list | join(', ') }}{% endif %}",
    # --- blocks ---
    "macros that call themselves": "{% macro shown(value, deep=0) -%}"
    "{%- if value is mapping -%}{{ '{' }}{%- for key, one in value | dictsort -%}"
    "{{ key }}:{{ shown(one, deep + 1) }}{%- endfor -%}{{ '}' }}"
    "{%- elif value is sequence and value is not string -%}"
    "{%- for one in value -%}{{ shown(one, deep=deep + 1) }},{%- endfor -%}"
    "{%- else -%}{{ value }}@{{ deep }}{{ varargs }}{{ kwargs }}{%- endif -%}{%- endmacro %}"
    "{{ shown(tools) }}{{ shown(1, 2, 3, a=4) }}{{ shown.name }}{{ shown.arguments }}",
    "a state handed to macros": "{% macro add(state) %}{% set state.n = state.n + 1 %}"
    "{% endmacro %}"
    "{% set state = namespace(n=0, seen=[]) %}"
    + EACH
    + "{{ add(state) }}{% set state.seen = state.seen + [message.role] %}"
    + END
    + "{{ state.n }}{{ state.seen }}",
    "namespaces of a mapping": "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns['b'] }}"
    "{% set ns.c = 3 %}{{ ns.c }}{{ ns.d is defined }}{{ namespace(self=4).self }}",
    "a caller": "{% macro box(x) %}<{{ caller(x) }}>{% endmacro %}"
    "{% call(x) box(1) %}{{ x }}{{ messages | length }}{% endcall %}",
    "blocks that are set": "{% set text %}a{{ messages[0].role }}{% endset %}{{ text | upper }}"
    "{% filter upper %}x{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}"
    "{% raw %}{{ x }}{% endraw %}{# nothing #}",
    "loops that are left": EACH
    + "{%- if message.role == 'system' %}{% continue %}{%- endif %}{{ message.role }}"
    "{%- if loop.index == 3 %}{% break %}{%- endif %}"
    + END
    + "{% for x in [] %}{% else %}none{% endfor %}{% for a, b in [(1, 2)] %}{{ a }}{{ b }}"
    "{% endfor %}",
    "loops within loops": "{% for x in [1, 2] %}{% set outer = loop %}{% for y in 'ab' %}"
    "{{ outer.index }}{{ loop.index }}{{ y }}{% endfor %}{% endfor %}"
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth }}"
    "{% endfor %}",
    # --- marks of what is learned ---
    "marks": EACH
    + "{%- if message.role == 'assistant' %}{% generation %}{{ loop.index }}{{ message.content }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{%- endif %}" + END,
    "marks and what is set in them": "{% set ns = namespace(a=1) %}{% set b = 1 %}"
    "{% generation %}{% set ns.a = 2 %}{% set b = 2 %}{{ b }}{% endgeneration %}{{ ns.a }}{{ b }}",
    "marks without white space": "a\n  {%- generation -%}\n  x\n  {%- endgeneration -%}\n b\n"
    "  {% generation %}\n  y\n  {% endgeneration %}\nc",
    "marks with a loop in them": "{% generation %}{% for x in [1, 2, 3] %}{% if x == 2 %}"
    "{% continue %}"
    "{% endif %}{{ x }}{% endfor %}{% endgeneration %}",
    # --- texts ---
    "white space": "\n  {% if true %}\n    a\n  {%- endif +%}\n  {%+ if true %}  b{% endif %}"
    "\n\n\n",
    "methods of texts": "{% set t = ' a-b-a \n' %}{{ t.strip() }}|{{ t.lstrip() }}"
    "|{{ t.rstrip('\n') }}|"
    "{{ t.split('-') }}{{ t.rsplit('-', 1) }}{{ t.replace('a', 'x') }}{{ t.upper() }}"
    "{{ t.title() }}"
    "{{ t.find('b') }}{{ t.count('a') }}{{ t.startswith(' ') }}{{ t.partition('-') }}"
    "{{ ','.join(['x', 'y']) }}{{ '{} {a}'.format(1, a=2) }}{{ t.splitlines() }}{{ t.isspace() }}"
    "{{ t.removeprefix(' ') }}{{ t[::-1] }}{{ t[1:-2] }}{{ t * 2 }}{{ 'a' ~ 1 ~ none }}"
    "{{ '%s-%d' % ('a', 3) }}{{ 'é'.encode('utf-8') | length }}",
    "filters of texts": "{% set t = ' a b\nc ' %}{{ t | trim }}{{ t | trim(' c') }}"
    "{{ t | indent(2) }}"
    "{{ t | replace(' ', '_') }}{{ t | title }}{{ t | capitalize }}{{ t | wordcount }}"
    "{{ t | length }}"
    "{{ '3' | int + 1 }}{{ '2.5' | float }}{{ 2.55 | round(1) }}{{ [3, 1] | sort | list }}"
    "{{ -1 | abs }}"
    "{{ 'abc' | list | reverse | join }}{{ '<' | e }}{{ 'x' | safe }}{{ t | truncate(3) }}"
    "{{ 'a,b' | string | upper | lower }}{{ [1, 2, 3] | sum }}{{ [1, 2] | max }}"
    "{{ 'a' | center(3) }}"
    "{{ [1, 2, 3] | batch(2) | list }}{{ [[1, 2]] | tojson }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "numbers and comparisons": "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 7 / 2 }}{{ 1 < 2 <= 2 }}"
    "{{ not 1 }}"
    "{{ 1 and 'x' }}{{ 0 or 'y' }}{{ 'a' in 'ab' }}{{ 3 is divisibleby 3 }}{{ 2 is even }}"
    "{{ 1 is eq 1 }}"
    "{{ none is none }}{{ None }}{{ True }}{{ 1 if false }}{{ x is undefined }}{{ 'a' is lower }}",
    "ranges and others": "{{ range(3) | list }}{{ range(messages | length) | last }}"
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}"
    "{{ j() }}{{ j() }}",
}


REFUSALS = {
    "JSON of what is none": "{{ nothing | tojson }}",
    # --- refusing ---
    "roles must alternate": f"{EACH}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate: ' ~ loop.index) }}{%- endif %}{{ message.role }}"
    + END,
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}",
    "an identity that is too short": EACH + "{%- for call in message.tool_calls or [] %}"
    "{%- if call.id is not defined or call.id | length "
    "!= 9 %}{{- raise_exception('ids need 9 characters') }}{%- endif %}{%- endfor %}" + END,
    "sums of what does not go together": "{{ 'a' + messages[4].tool_calls[0].function.arguments }}",
    "attributes of what is not there": "{{ nothing.more }}",
    # --- the sandbox ---
    "names stored in a namespace": "{% set ns = namespace(_x=1) %}",
    "what cannot be changed": "{{ messages.append(1) }}",
    "what cannot be taken away": "{{ messages[0].pop('role') }}",
    "ranges without end": "{{ range(10000000) | list | length }}",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_as_in_transformers(feature: str) -> None:
    assert agree(FEATURES[feature]) is not None
    agree(FEATURES[feature], MESSAGES, None)
    agree(FEATURES[feature], MESSAGES[1:3], None)


@pytest.mark.parametrize("feature", REFUSALS)
def test_refused_as_in_transformers(feature: str) -> None:
    assert agree(REFUSALS[feature]) is None
    agree(REFUSALS[feature], MESSAGES[1:3], None)


REASONING = (
    EACH + "{{ message.reasoning_content }}|{{ message.thinking }}|{{ message.reasoning }};" + END
)


@pytest.mark.parametrize(
    "names",
    [
        ("reasoning_content",),
        ("thinking",),
        ("reasoning",),
        ("thinking", "reasoning"),
        ("reasoning", "reasoning_content", "thinking"),
    ],
)
def test_thinking_is_under_the_same_names(names: tuple[str, ...]) -> None:
    answer = said("b") | {name: f"in {name}" for name in names}
    row = {"messages": [user("a"), answer | {"reasoning_content": answer.get("reasoning_content")}]}
    parsed = parse(row, "messages", {})
    assert isinstance(parsed, Conversation)
    found = ChatTemplate(REASONING, "here", NAMED).render(parsed.messages)
    assert found == theirs(REASONING, row["messages"], None, False)
    assert found.count("in ") >= 2
