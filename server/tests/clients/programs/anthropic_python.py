#!/usr/bin/env python3
"""Drives a Tandem server with the anthropic package: anthropic_python.py URL KEY demo|scripted"""

import sys

import anthropic

TASK = "Read note.txt and tell me the password."
TOOLS = [
    {
        "name": "read_file",
        "description": "Reads a file",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }
]


def demo(client):
    messages = [{"role": "user", "content": "Say hello."}]
    answer = client.messages.create(model="deep", max_tokens=8, messages=messages)
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer
    with client.messages.stream(model="fast", max_tokens=8, messages=messages) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text
    assert client.messages.count_tokens(model="deep", messages=messages).input_tokens > 0
    for call, kind in (
        (lambda: client.messages.create(model="none", max_tokens=8, messages=messages), anthropic.NotFoundError),
        (lambda: client.messages.create(model="deep", max_tokens=0, messages=messages), anthropic.BadRequestError),
        (
            lambda: client.with_options(api_key="wrong").messages.create(
                model="deep", max_tokens=8, messages=messages
            ),
            anthropic.AuthenticationError,
        ),
    ):
        try:
            call()
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} was raised")


def scripted(client):
    messages = [{"role": "user", "content": TASK}]
    with client.messages.stream(model="auto", max_tokens=1000, messages=messages, tools=TOOLS) as stream:
        answer = stream.get_final_message()
    assert answer.stop_reason == "tool_use", answer
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert call.input == {"path": "note.txt"}, call
    messages.append({"role": "assistant", "content": answer.content})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "The password is pelican-4711."}
    messages.append({"role": "user", "content": [result]})
    answer = client.messages.create(model="auto", max_tokens=1000, messages=messages, tools=TOOLS)
    assert "pelican-4711" in answer.content[0].text, answer


if __name__ == "__main__":
    url, key, mode = sys.argv[1:]
    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=120)
    {"demo": demo, "scripted": scripted}[mode](client)
    print(f"ok   messages, {mode}")
