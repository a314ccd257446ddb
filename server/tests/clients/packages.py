"""The packages that programs talk through, each with a program of its own in programs/. Light: no agent's prompts,
seconds each."""

import sys
from pathlib import Path

from support import KEY, TASK, call

PROGRAMS = Path(__file__).parent / "programs"


class Package:
    """One program, run against the demo pair and against the script."""

    def __init__(self, program, pip=(), npm=()):
        self.program = PROGRAMS / program
        self.pip = pip
        self.npm = npm

    def script(self, box):
        return [
            {"when": ["pelican-4711"], "say": "The password is pelican-4711, as the note says."},
            {"when": ["Tools:", TASK], "say": call("read_file", {"path": "note.txt"})},
            {"when": [], "say": "Hello."},
        ]

    def run(self, box, url, mode):
        environment = {}
        if self.npm:
            box.npm(*self.npm)
            interpreter = "node"
            environment["PACKAGES"] = str(box.folder)
        else:
            interpreter = box.pip(*self.pip) / "python" if self.pip else sys.executable
        print(box.run([interpreter, self.program, url, KEY, mode], environment), end="")

    def turn(self, box, url):
        self.run(box, url, "demo")

    def tool_loop(self, box, url):
        self.run(box, url, "scripted")


PACKAGES = {
    "openai-python": Package("openai_python.py", pip=["openai==3.54.0"]),
    "openai-node": Package("openai_node.mjs", npm=["openai@6.49.0"]),
    "anthropic-python": Package("anthropic_python.py", pip=["anthropic==2.12.0"]),
    "langchain": Package("langchain_openai.py", pip=["langchain-openai==1.7.3"]),
    "ollama-python": Package("ollama_python.py", pip=["ollama==0.6.3"]),
    "ollama-node": Package("ollama_node.mjs", npm=["ollama@0.6.4"]),
    "tabby-agent": Package("tabby_agent.mjs", npm=["tabby-agent@1.5.0"]),
    "llama-vscode": Package("llama_vscode.py"),
}
