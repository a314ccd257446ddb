"""Renders chat templates with transformers and writes chat.json, to which chat_template.rs is held.

    python models/tests/golden/chat.py                          # rewrites chat.json and published.json beside it
    python models/tests/golden/chat.py FOLDER OUT.json          # the same conversations, all FOLDER/*.jinja

Needs transformers 5 and jinja2. The second form is for templates whose licence keeps them out of this
repository: check them with
    TANDEM_CHAT_GOLDEN=OUT.json cargo test -p tandem-models --test chat_template -- --ignored

Those in templates/ are published ones; templates/SOURCES.md says whose. The others, in this file, were written for
this repository in the style of well-known ones, to use the same features.
"""

import datetime
import json
import pathlib
import sys

from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent


class FixedDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2024, 7, 26, 12, 0, 0, tzinfo=tz)


chat_template_utils.datetime = FixedDatetime

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Given functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call at a time!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
    {%- else %}
        {{- "<|head|>result<|/head|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

THINKING = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}\
{{'<U>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<A>' + content.lstrip('\\n') + eos_token}}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}\
{{'<T>' ~ message['content'] ~ '</T>'}}{%- endif %}{%- endfor -%}\
{% if ns.is_tool %}{{'</outputs>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<A><think>\\n'}}{% endif %}"""

ALTERNATING = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if message["role"] in ["user", "assistant"] and not message.tool_calls is defined %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.content is not none and message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[RESULT]{"content": ' + message.content|string + '}[/RESULT]' }}
    {%- endif %}
{%- endfor %}
"""

FEATURES = """{%- macro part(item, depth=0) -%}
{%- if item is string -%}{{ item }}{%- elif item is mapping -%}
{%- for key, value in item | dictsort %}{{ '  ' * depth }}{{ key }}={{ part(value, depth + 1) }};{% endfor -%}
{%- elif item is iterable -%}{%- for x in item %}{{ part(x, depth + 1) }}{% if not loop.last %}|{% endif %}{% endfor -%}
{%- else -%}{{ item }}{%- endif -%}
{%- endmacro -%}
{% for message in messages[::-1] %}
    {% if loop.first %}FIRST {% endif %}
  {{ loop.index }}/{{ loop.length }} {{ message.role | upper }}
    {% if message.role == 'assistant' %}
    {% generation %}
    {{ message.content }}{{ eos_token }}
    {%- endgeneration %}
    {% endif %}
{% endfor %}
{% set captured %}{{ part(extra_value) }} {{ part([1, 'two', 3.5, true, none]) }}{% endset %}
<{{ captured | trim }}> {{ captured | length > 3 }}
{{ none }} {{ true }} {{ 1.0 }} {{ 1e20 }} {{ [1, 'a', none, true, {'k': "it's"}] }} {{ (1, 2) }}
{{ extra_value | tojson }} {{ extra_value | tojson(separators=(',', ':'), sort_keys=true) }} {{ "\\u00e9<&>" | tojson }}
{{ "\\u00e9😀" | tojson(ensure_ascii=true) }} {{ [] | tojson(indent=2) }} {{ {} | tojson(indent=2) }}
{{ ' x y '.strip() }}|{{ 'aXbXc'.split('X', 1) }}|{{ 'abc'.startswith('ab') }}|{{ 'a-b'.replace('-', '+') }}|{{ 'title case'.title() }}
{{ messages | map(attribute='role') | join(', ') }} {{ ['b', 'a'] | sort | first }} {{ undefined_thing }}{{ undefined_thing is defined }} {{ none is iterable }} {{ {} is sequence }} {{ 'x' is iterable }}
{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 }} {{ 'ab' * 2 }} {{ [1] + [2] }} {{ 'x' ~ 1 ~ none }} {{ 1 if messages else 2 }} {{ 7 / 2 }}
{%- for n in range(5) %}{% if n == 1 %}{% continue %}{% endif %}{% if n == 3 %}{% break %}{% endif %} n{{ n }}{% endfor %}
{{ 'a\\nb' | indent(2) }} {{ {'b': 1, 'a': 2}.items() | list }} {{ extra_value.get('missing', 'default') }}
"""

OWN = {"headers": HEADERS, "thinking": THINKING, "alternating": ALTERNATING, "features": FEATURES}

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather in a \"city\"", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "Ort, z.B. Zürich"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "Time", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "callid001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}]}

CONVERSATIONS = {
    "plain": ([{"role": "user", "content": "Hi <there> & \"you\""}], None, True),
    "system": ([{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "1+1?\n"},
                {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"}, {"role": "user", "content": "  Sure? 😀"}], None, True),
    "no_prompt": ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, False),
    "tools": ([{"role": "system", "content": "S"}, {"role": "user", "content": "Weather?"}], TOOLS, True),
    "tool_result": ([{"role": "user", "content": "Weather?"}, CALL,
                     {"role": "tool", "name": "get_weather", "tool_call_id": "callid001", "content": "21"},
                     {"role": "assistant", "content": "21 degrees"}, {"role": "user", "content": "Thanks"}], TOOLS, True),
    "parallel_calls": ([{"role": "user", "content": "Both?"},
                        CALL | {"tool_calls": [CALL["tool_calls"][0], {"id": "callid002", "type": "function",
                                                                       "function": {"name": "now", "arguments": {}}}]},
                        {"role": "tool", "name": "get_weather", "tool_call_id": "callid001", "content": "21"},
                        {"role": "tool", "name": "now", "tool_call_id": "callid002", "content": "{\"h\": 12}"}], TOOLS, True),
    "wrong_order": ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], None, True),
}
EXTRA = {"extra_value": {"z": [1, {"y": None}], "a": "b", "f": 0.1, "t": True}}


def cases(templates):
    for template, source in templates.items():
        compiled = chat_template_utils._compile_jinja_template(source)
        for name, (messages, tools, prompt) in CONVERSATIONS.items():
            case = {"template": template, "conversation": name}
            try:
                case["expected"] = compiled.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=prompt,
                    bos_token="<s>", eos_token="</s>", **EXTRA)
            except Exception as error:
                case["error"] = str(error)
            yield case


def write(templates, out, with_sources=True):
    conversations = {name: {"messages": m, "tools": t, "add_generation_prompt": p} for name, (m, t, p) in CONVERSATIONS.items()}
    sources = templates if with_sources else {}
    golden = {"templates": sources, "conversations": conversations, "extra": EXTRA, "cases": list(cases(templates))}
    out.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


def read(folder):
    return {path.name: path.read_text() for path in sorted(pathlib.Path(folder).glob("*.jinja"))}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(read(sys.argv[1]), pathlib.Path(sys.argv[2]))
    else:
        write(OWN, HERE / "chat.json")
        write(read(HERE / "templates"), HERE / "published.json", with_sources=False)
