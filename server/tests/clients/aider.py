"""aider: chat completions through litellm, edits as text."""

from support import KEY, expect

VERSION = "0.86.2"
TASK = "Fix add in calc.py."
EDIT = """\
calc.py
```python
<<<<<<< SEARCH
    return a - b
=======
    return a + b
>>>>>>> REPLACE
```
"""


def script(box):
    return [{"when": [TASK], "say": EDIT}, {"when": [], "say": "Hello."}]


def ask(box, url, *options):
    programs = box.pip(f"aider-chat=={VERSION}")
    environment = {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": KEY}
    command = [programs / "aider", "--model", "openai/auto", "--no-git", "--yes-always", "--no-analytics"]
    command += ["--no-check-update", "--no-show-model-warnings", "--no-show-release-notes", "--no-pretty"]
    command += ["--map-tokens", "0", *options]
    output = box.run(command, environment)
    expect("litellm." not in output, output)
    return output


def turn(box, url):
    ask(box, url, "--edit-format", "ask", "--message", "Say hello.")


def tool_loop(box, url):
    output = ask(box, url, "--edit-format", "diff", "--message", TASK, "calc.py")
    expect("return a + b" in (box.project / "calc.py").read_text(), output)
