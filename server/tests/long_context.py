#!/usr/bin/env python3
"""Serves a model with a context of 128K tokens and fills it, over HTTP, on both lanes.

    long_context.py [--tokens N] [--kv-dtype f16|q8] [--built FOLDER] [--lanes fast,deep] [-- OPTIONS OF serve]

Without options of its own after `--` it takes the demo pair, stretched by YaRN from 4,096 tokens to 131,072. For each
lane: a prompt of N tokens (120,000 by default) made of this repository's sources, the same with speculation switched
off, which must give the same answer, and a second turn that adds to the first, which must come from the prefix cache.
Prints what the server says of its memory and how long things took. Minutes on a small machine: attention at this
length is nearly all of it. Python 3.10, nothing else.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TOKENS = 24
SECOND_TURN = "\n\n# In short:\n"


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=3600) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code}: {error.read().decode()}")
    return answer, time.monotonic() - start


def text_of(url, lane, num_tokens):
    """Sources of this repository, cut to the number of tokens that a lane makes of them."""
    files = subprocess.run(["git", "ls-files", "*.rs", "*.md"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    names = files.stdout.decode().split()
    text = "".join((ROOT / name).read_text() for name in names)
    tokens, took = post(f"{url}/tokenize", {"model": lane, "content": text[: 12 * num_tokens]})
    print(f"{lane}: tokenized {len(tokens['tokens'])} tokens in {took:.2f} s")
    if len(tokens["tokens"]) < num_tokens:
        sys.exit(f"there is text of {len(tokens['tokens'])} tokens only")
    return post(f"{url}/detokenize", {"model": lane, "tokens": tokens["tokens"][:num_tokens]})[0]["content"]


def ask(url, lane, prompt, what, **more):
    body = {"model": lane, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "seed": 7, "ignore_eos": True, **more}
    answer, took = post(f"{url}/v1/completions", body)
    timings = answer["timings"]
    text = answer["choices"][0]["text"]
    print(
        f"{lane}: {what}: {timings['prompt_n']} prompt tokens, {timings['cache_n']} of them cached, "
        f"{took:.1f} s ({timings['prompt_ms'] / 1000:.1f} s prompt, {timings['predicted_ms']:.0f} ms answer, "
        f"{timings['draft_n_accepted']}/{timings['draft_n']} drafted tokens accepted)",
        flush=True,
    )
    return text, timings


def expect(condition, message):
    if not condition:
        sys.exit(f"FAIL: {message}")


def check(url, lane, num_tokens):
    prompt = text_of(url, lane, num_tokens)
    first, timings = ask(url, lane, prompt, "first turn")
    expect(timings["cache_n"] < num_tokens // 2, "the first turn was cached")
    # With the cache, so that it is not computed again: what is cached is what would be computed.
    plain, _ = ask(url, lane, prompt, "without speculation", speculative={"max_draft_tokens": 0})
    expect(plain == first, f"{lane}: with speculation {first!r}, without {plain!r}")
    _, timings = ask(url, lane, prompt + first + SECOND_TURN, "second turn")
    expect(timings["cache_n"] > 0.95 * num_tokens, "the second turn was computed anew")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--kv-dtype", default="f16")
    parser.add_argument("--lanes", default="fast,deep")
    parser.add_argument("--built", type=Path, default=ROOT / "target" / "release", help="where the binary is")
    parser.add_argument("serve", nargs="*", help="options of `tandem serve`, after --")
    options = parser.parse_args()
    command = [options.built / "tandem", "serve", "--port", "0", "--kv-dtype", options.kv_dtype]
    command += options.serve or ["--rope-scaling", "yarn:32"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        url = None
        for line in server.stdout:
            print(line, end="", flush=True)
            url = url or re.search(r"http://[^\s/]+:\d+", line)
            if "/v1/completions" in line:
                break
        expect(url, "the server printed no address")
        for lane in options.lanes.split(","):
            check(url.group(), lane, options.tokens)
    finally:
        server.terminate()
        server.wait(timeout=60)
    print("ok")


if __name__ == "__main__":
    main()
