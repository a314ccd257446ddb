"""Anthropic's Claude Code: Messages, with HEAD / before them."""

from support import KEY, TASK, expect, loop

VERSION = "2.1.197"


def script(box):
    return loop("Read", {"file_path": str(box.project / "note.txt")})


def ask(box, url, task, *options, fails=False):
    programs = box.npm(f"@anthropic-ai/claude-code@{VERSION}")
    environment = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": KEY,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    command = [programs / "claude", "-p", task, "--model", "auto", *options]
    return box.run(command, environment, fails=fails)


def turn(box, url):
    # Its own instructions alone are longer than the demo pair's context: the user is to see that.
    output = ask(box, url, "Say hello.", fails=True)
    expect("the context holds 4096" in output, output)


def tool_loop(box, url):
    output = ask(box, url, TASK, "--allowedTools", "Read")
    expect("The password is pelican-4711" in output, output)
