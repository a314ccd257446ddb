#!/usr/bin/env python3
"""Drives a Tandem server with LangChain's OpenAI chat model: langchain_openai.py URL KEY demo|scripted"""

import sys

# This file is named as the package: it must not find itself.
sys.path.pop(0)

from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402

TASK = "Read note.txt and tell me the password."


@tool
def read_file(path: str) -> str:
    """Reads a file"""
    return f"{path}: The password is pelican-4711."


def demo(model):
    answer = model.bind(max_tokens=8).invoke("Say hello.")
    assert answer.usage_metadata["output_tokens"] <= 8, answer
    chunks = list(model.bind(max_tokens=8).stream("Say hello."))
    assert any(chunk.usage_metadata for chunk in chunks), chunks
    answers = model.bind(max_tokens=4).batch(["One", "Two", "Three"])
    assert len(answers) == 3


def scripted(model):
    model = model.bind_tools([read_file])
    messages = [HumanMessage(TASK)]
    whole = None
    for chunk in model.stream(messages):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert call["args"] == {"path": "note.txt"}, call
    messages += [whole, ToolMessage(read_file.invoke(call["args"]), tool_call_id=call["id"])]
    answer = model.invoke(messages)
    assert "pelican-4711" in answer.content, answer


if __name__ == "__main__":
    url, key, mode = sys.argv[1:]
    functions = {"demo": demo, "scripted": scripted}
    for responses in (False, True):
        model = ChatOpenAI(
            model="auto",
            base_url=f"{url}/v1",
            api_key=key,
            max_retries=0,
            timeout=120,
            stream_usage=True,
            use_responses_api=responses,
        )
        if mode == "scripted" and responses:
            # There, content is a list of blocks.
            continue
        functions[mode](model)
    print(f"ok   chats, {mode}")
