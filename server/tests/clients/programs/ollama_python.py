#!/usr/bin/env python3
"""Drives a Tandem server with Ollama's Python package: ollama_python.py URL KEY demo|scripted"""

import json
import sys

import ollama

TASK = "Read note.txt and tell me the password."


def read_file(path: str) -> str:
    """Reads a file

    Args:
      path: where it lies
    """
    return f"{path}: The password is pelican-4711."


def demo(client):
    names = [model.model for model in client.list().models]
    assert "auto" in names and "deep" in names, names
    assert client.ps().models, "none is loaded"
    shown = client.show("deep")
    assert shown.modelinfo["tandem.context_length"] > 0 and "completion" in shown.capabilities, shown
    options = {"num_predict": 8, "temperature": 0, "seed": 7}
    messages = [{"role": "user", "content": "Say hello."}]
    answer = client.chat("deep:latest", messages, options=options)
    assert answer.done and answer.eval_count <= 8 and answer.message.role == "assistant", answer
    parts = list(client.chat("deep", messages, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == answer.message.content, parts
    assert [part.done for part in parts].count(True) == 1 and parts[-1].done, parts
    whole = client.generate("fast", "def add(a, b):", raw=True, options=options)
    streamed = client.generate("fast", "def add(a, b):", raw=True, options=options, stream=True)
    assert "".join(part.response for part in streamed) == whole.response
    gap = client.generate("fast", "def add(a, b):\n    ", suffix="\n", options=options)
    assert isinstance(gap.response, str)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
    }
    held = client.generate("deep", "A number.", format=schema, options={**options, "num_predict": 64})
    assert json.loads(held.response)["n"] in range(10), held
    try:
        client.chat("none", messages)
    except ollama.ResponseError as error:
        assert error.status_code == 404 and "none" in error.error, error
    else:
        raise AssertionError("there is a model called none")


def scripted(client):
    messages = [{"role": "user", "content": TASK}]
    calls = []
    for part in client.chat("auto", messages, tools=[read_file], stream=True):
        calls += part.message.tool_calls or []
    (call,) = calls
    assert call.function.name == "read_file" and call.function.arguments == {"path": "note.txt"}, call
    messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    messages.append({"role": "tool", "tool_name": "read_file", "content": read_file(**call.function.arguments)})
    answer = client.chat("auto", messages, tools=[read_file])
    assert "pelican-4711" in answer.message.content, answer


if __name__ == "__main__":
    url, key, mode = sys.argv[1:]
    client = ollama.Client(host=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
    {"demo": demo, "scripted": scripted}[mode](client)
    print(f"ok   ollama, {mode}")
