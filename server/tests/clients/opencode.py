"""opencode: chat completions through the AI SDK, with a second model for titles."""

import json

from support import KEY, TASK, expect, loop

VERSION = "1.18.33"


def script(box):
    return loop("read", {"filePath": str(box.project / "note.txt")})


def ask(box, url, task, small="fast", prompt=None):
    programs = box.npm(f"opencode-ai@{VERSION}")
    config = {
        "autoupdate": False,
        "share": "disabled",
        "model": "tandem/auto",
        "small_model": f"tandem/{small}",
        "provider": {
            "tandem": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Tandem",
                "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
                "models": {"auto": {"name": "auto"}, "fast": {"name": "fast"}},
            }
        },
    }
    if prompt:
        config["agent"] = {"build": {"prompt": prompt}}
    folder = box.home / ".config" / "opencode"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "opencode.json").write_text(json.dumps(config))
    command = [programs / "opencode", "run", "--pure", "--auto", "--print-logs", "--log-level", "ERROR", task]
    output = box.run(command, {"OPENCODE_DISABLE_MODELS_FETCH": "1"})
    expect("APICallError" not in output and "stream error" not in output, output)
    return output


def turn(box, url):
    # Its own instructions and the answer to them would fill the demo pair's context.
    ask(box, url, "Say hello.", prompt="You help programmers. Answer briefly.")


def tool_loop(box, url):
    output = ask(box, url, TASK, small="auto")
    expect("The password is pelican-4711" in output, output)
