#!/usr/bin/env python3
"""Drives a Tandem server with the openai package, as a user's program would.

    openai_python.py URL KEY demo|scripted

Prints one line a check; exits with 1 at the first that fails.
"""

import json
import sys

import openai

PROMPT = "def fibonacci(n):\n"
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]


def token_counts(usage):
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def expect_error(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def models(client):
    ids = [model.id for model in client.models.list()]
    assert {"fast", "deep", "auto"} <= set(ids), ids
    assert client.models.retrieve("deep").id == "deep"
    error = expect_error(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))
    assert error.code == "model_not_found", error.body


def completion(client, lane):
    answer = client.completions.create(model=lane, prompt=PROMPT, max_tokens=32, temperature=0)
    assert answer.model == lane and answer.object == "text_completion", answer
    assert answer.choices[0].text and answer.choices[0].finish_reason in ("stop", "length"), answer
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens >= 0 and details.rejected_prediction_tokens >= 0, usage
    if lane == "fast":
        assert details.accepted_prediction_tokens == details.rejected_prediction_tokens == 0, usage
    stream = client.completions.create(
        model=lane,
        prompt=PROMPT,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].text, (text, answer.choices[0].text)
    assert token_counts(chunks[-1].usage) == token_counts(usage), (chunks[-1], usage)


def completion_options(client):
    answer = client.completions.create(
        model="deep", prompt=PROMPT, max_tokens=24, seed=7, n=2, logprobs=3, echo=True, stop=["\n\n\n"]
    )
    assert len(answer.choices) == 2, answer
    for choice in answer.choices:
        assert choice.text.startswith(PROMPT), choice.text
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset), logprobs
        assert logprobs.token_logprobs[0] is None and logprobs.token_logprobs[-1] <= 0, logprobs
    again = client.completions.create(model="deep", prompt=PROMPT, max_tokens=24, seed=8, stop=["\n\n\n"])
    assert answer.choices[1].text == PROMPT + again.choices[0].text, "the second choice is seed + 1"


def fill_in_the_middle(client):
    answer = client.completions.create(
        model="fast", prompt="def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))\n", max_tokens=16
    )
    assert answer.choices[0].finish_reason in ("stop", "length"), answer


def raw_headers(client):
    raw = client.completions.with_raw_response.create(model="auto", prompt=PROMPT, max_tokens=4)
    assert raw.headers["x-tandem-lane"] == "fast", raw.headers
    seed = int(raw.headers["x-tandem-seed"])
    answer = raw.parse()
    assert answer.seed == seed and answer.timings["predicted_n"] == answer.usage.completion_tokens, answer
    again = client.completions.create(model="auto", prompt=PROMPT, max_tokens=4, seed=seed)
    assert again.choices[0].text == answer.choices[0].text, "a drawn seed repeats the answer"


def chat(client, lane):
    def ask(**options):
        return client.chat.completions.create(
            model=lane, messages=MESSAGES, max_completion_tokens=32, temperature=0, **options
        )

    answer = ask(logprobs=True, top_logprobs=2)
    message = answer.choices[0].message
    assert answer.object == "chat.completion" and message.role == "assistant", answer
    for token in answer.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2, token
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == message.content, (text, message.content)
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason, chunks[-2]
    # What the cache had of the prompt differs: the second request finds the first one's.
    assert token_counts(chunks[-1].usage) == token_counts(answer.usage), chunks[-1]


def leaving_early(client):
    """A client that closes its stream leaves a server that goes on."""
    with client.completions.create(model="deep", prompt=PROMPT, max_tokens=512, stream=True) as stream:
        next(iter(stream))
    client.completions.create(model="deep", prompt=PROMPT, max_tokens=4)


def errors(client):
    def complete(**options):
        return lambda: client.completions.create(**{"model": "deep", "prompt": PROMPT, **options})

    error = expect_error(openai.NotFoundError, complete(model="gpt-4"))
    assert error.code == "model_not_found" and error.param == "model" and "deep" in error.message, error.body
    for param, options in {
        "max_tokens": {"max_tokens": -1},
        "temperature": {"temperature": 1e308},
        "top_p": {"top_p": 2},
        "n": {"n": 100_000},
        "stop": {"stop": ""},
        "prompt": {"prompt": ""},
    }.items():
        error = expect_error(openai.BadRequestError, complete(**options))
        assert error.param == param and error.type == "invalid_request_error", error.body
    error = expect_error(openai.BadRequestError, complete(prompt="word " * 20_000))
    assert error.code == "context_length_exceeded", error.body
    error = expect_error(
        openai.BadRequestError, lambda: client.chat.completions.create(model="deep", messages=[])
    )
    assert error.param == "messages", error.body


def keys(url, key):
    error = expect_error(
        openai.AuthenticationError,
        lambda: openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list(),
    )
    assert error.code == "invalid_api_key", error.body
    openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).models.list()


def check(name, function, *arguments):
    function(*arguments)
    print(f"ok   {name}", flush=True)


def demo(url, key):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    check("API keys", keys, url, key)
    check("models", models, client)
    for lane in ("fast", "deep", "auto"):
        check(f"completion, {lane}", completion, client, lane)
        check(f"chat, {lane}", chat, client, lane)
    check("n, seed, logprobs, echo, stop", completion_options, client)
    check("fill-in-the-middle", fill_in_the_middle, client)
    check("lane and seed headers", raw_headers, client)
    check("a stream closed early", leaving_early, client)
    check("typed errors", errors, client)
    check("responses", responses, client)


def responses(client):
    first = client.responses.create(model="deep", input="Say hello.", max_output_tokens=8)
    assert first.status in ("completed", "incomplete") and first.usage.output_tokens <= 8, first
    assert client.responses.retrieve(first.id).output == first.output
    assert client.responses.input_items.list(first.id).data[0].role == "user"
    with client.responses.stream(
        model="deep", input="And again.", previous_response_id=first.id, max_output_tokens=8
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    client.responses.delete(first.id)
    expect_error(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


TOOL = {
    "name": "read_file",
    "description": "Reads a file",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}
TASK = "Read note.txt and tell me the password."


def chat_loop(client):
    messages = [{"role": "user", "content": TASK}]
    tools = [{"type": "function", "function": TOOL}]
    with client.chat.completions.stream(model="auto", messages=messages, tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"path": "note.txt"}, call
    messages.append(message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "The password is pelican-4711."})
    answer = client.chat.completions.create(model="auto", messages=messages, tools=tools)
    assert "pelican-4711" in answer.choices[0].message.content, answer


def responses_loop(client):
    tools = [{"type": "function", "strict": False, **TOOL}]
    first = client.responses.create(model="auto", input=TASK, tools=tools)
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "pelican-4711"}
    answer = client.responses.create(
        model="auto", input=[result], tools=tools, previous_response_id=first.id
    )
    assert "pelican-4711" in answer.output_text, answer


def scripted(url, key):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    check("a tool loop in chats", chat_loop, client)
    check("a tool loop in responses", responses_loop, client)


if __name__ == "__main__":
    {"demo": demo, "scripted": scripted}[sys.argv[3]](sys.argv[1], sys.argv[2])
