"""Continue's command line: chat completions through the openai package for Node."""

from support import KEY, TASK, expect, loop

VERSION = "1.5.47"
CONFIG = """\
name: Tandem
version: 1.0.0
schema: v1
models:
  - name: auto
    provider: openai
    model: auto
    apiBase: {url}/v1
    apiKey: {key}
    roles: [chat]
"""


def script(box):
    return loop("Read", {"filepath": "note.txt"})


def ask(box, url, task):
    programs = box.npm(f"@continuedev/cli@{VERSION}")
    config = box.home / "config.yaml"
    config.write_text(CONFIG.format(url=url, key=KEY))
    environment = {"CONTINUE_GLOBAL_DIR": str(box.home), "CONTINUE_TELEMETRY_ENABLED": "0"}
    output = box.run([programs / "cn", "--config", config, "--allow", "Read", "-p", task], environment)
    expect(output.strip() and "Error" not in output, output)
    return output


def turn(box, url):
    ask(box, url, "Say hello.")


def tool_loop(box, url):
    output = ask(box, url, TASK)
    expect("The password is pelican-4711" in output, output)
