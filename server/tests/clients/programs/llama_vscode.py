#!/usr/bin/env python3
"""The requests of the editor plug-in llama.vscode, in its order: llama_vscode.py URL KEY demo|scripted

Typed keys of a user: a prewarming request for a file's chunks, an infill for the cursor, another one while the
first may still run, and the chat of its side bar.
"""

import json
import sys
import urllib.request


def post(url, key, path, body):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def infill(**fields):
    return {
        "input_prefix": "def add(a, b):\n",
        "prompt": "    return ",
        "input_suffix": "\n\nprint(add(1, 2))\n",
        "input_extra": [{"filename": "calc.py", "text": "def sub(a, b):\n    return a - b\n", "time": 1}],
        "n_predict": 16,
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 2500,
        **fields,
    }


def demo(url, key):
    warm = post(url, key, "/infill", infill(n_predict=0, samplers=[], t_max_prompt_ms=1, t_max_predict_ms=1))
    assert warm["content"] == "", warm
    first = post(url, key, "/infill", infill(temperature=0))
    for field in ("content", "timings", "tokens_cached", "truncated", "generation_settings", "stop"):
        assert field in first, first
    assert first["timings"]["predicted_n"] > 0, first
    # What the next key press finds: one line further, with what was proposed typed.
    lines = infill(prompt="    return " + first["content"], temperature=0)
    assert "content" in post(url, key, "/infill", lines)
    chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "cache_prompt": True}
    chat["samplers"] = "edkypmxt"
    assert post(url, key, "/v1/chat/completions", chat)["choices"][0]["message"]["role"] == "assistant"


if __name__ == "__main__":
    if sys.argv[3] == "demo":
        demo(sys.argv[1], sys.argv[2])
        print("ok   infill")
