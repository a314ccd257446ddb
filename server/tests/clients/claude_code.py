"""Anthropic's Claude Code: Messages, with HEAD / before them."""

from support import KEY, TASK, expect, loop, terse_demo

VERSION = "2.1.197"


def script(box):
    return loop("Read", {"file_path": str(box.project / "note.txt")})


def serve(box):
    # Its own instructions and tools take about 5,000 tokens of the demo pair's.
    return [*terse_demo(box), "--rope-scaling", "yarn:4"]


def ask(box, url, task, *options):
    programs = box.npm(f"@anthropic-ai/claude-code@{VERSION}")
    environment = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": KEY,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    command = [programs / "claude", "-p", task, "--model", "auto", *options]
    return box.run(command, environment)


def turn(box, url):
    output = ask(box, url, "Say hello.")
    expect("API Error" not in output, output)


def tool_loop(box, url):
    output = ask(box, url, TASK, "--allowedTools", "Read")
    expect("The password is pelican-4711" in output, output)
