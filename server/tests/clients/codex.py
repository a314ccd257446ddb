"""OpenAI's Codex: Responses only."""

from support import KEY, TASK, expect, loop, terse_demo

VERSION = "0.169.0"
CONFIG = """\
model = "auto"
model_provider = "tandem"
[model_providers.tandem]
name = "Tandem"
base_url = "{url}/v1"
env_key = "TANDEM_API_KEY"
wire_api = "responses"
supports_websockets = {websockets}
[features]
shell_snapshot = false
"""


def script(box):
    return loop("exec_command", {"cmd": "cat note.txt"})


def serve(box):
    # Its own instructions and tools take about 7,000 tokens of the demo pair's.
    return [*terse_demo(box), "--rope-scaling", "yarn:4"]


def ask(box, url, task, websockets=False):
    programs = box.npm(f"@openai/codex@{VERSION}")
    text = CONFIG.format(url=url, websockets=str(websockets).lower())
    (box.home / "config.toml").write_text(text)
    command = [programs / "codex", "exec", "--skip-git-repo-check"]
    command += ["--dangerously-bypass-approvals-and-sandbox", task]
    return box.run(command, {"CODEX_HOME": str(box.home), "TANDEM_API_KEY": KEY})


def turn(box, url):
    for websockets in (False, True):
        output = ask(box, url, "Say hello.", websockets=websockets)
        expect("ERROR" not in output and "tokens used" in output, output)


def tool_loop(box, url):
    for websockets in (False, True):
        output = ask(box, url, TASK, websockets=websockets)
        expect("The password is pelican-4711" in output and "ERROR" not in output, output)
