"""What the scripts share: servers to talk to, installs in a scratch folder, programs in a clean environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

KEY = "dummy-key"
ROOT = Path(__file__).resolve().parents[3]


class Failure(Exception):
    """A client did not do what it should."""


class Server:
    """A program that prints its address and serves."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            cwd=ROOT,
            text=True,
        )
        killer = threading.Timer(120, self.process.kill)
        killer.start()
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            found = re.search(r"http://[^\s/]+:\d+", line)
            if found:
                killer.cancel()
                self.url = found.group()
                # Whatever else it prints must not fill the pipe.
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return
        killer.cancel()
        raise Failure("the server printed no address:\n" + "".join(seen))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=60)


class Box:
    """Where one client lives: its install, its home and a project to work on."""

    def __init__(self, scratch, name):
        self.folder = Path(scratch) / name
        self.home = self.folder / "home"
        self.project = self.folder / "project"

    def fresh(self):
        """Forgets what an earlier run left, but for the install."""
        for folder in (self.home, self.project):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        (self.project / "note.txt").write_text("The password is pelican-4711.\n")
        (self.project / "calc.py").write_text("def add(a, b):\n    return a - b\n")

    def npm(self, *packages):
        """Installs packages with their versions; returns the folder of their programs."""
        wanted = " ".join(packages)
        mark = self.folder / "installed"
        if not mark.is_file() or mark.read_text() != wanted:
            self.folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "init", "-y"], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
            command = ["npm", "install", "--no-fund", "--no-audit", "--loglevel", "error", *packages]
            subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
            mark.write_text(wanted)
        return self.folder / "node_modules" / ".bin"

    def pip(self, *packages):
        """Installs packages with their versions; returns the folder of their programs."""
        wanted = " ".join(packages)
        mark = self.folder / "installed"
        programs = self.folder / "venv" / "bin"
        if not mark.is_file() or mark.read_text() != wanted:
            self.folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
            pip = [programs / "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *packages], check=True)
            mark.write_text(wanted)
        return programs

    def run(self, command, environment=None, timeout=240):
        """Runs a program in the project with nothing of ours in its environment; returns what it printed."""
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TERM": "dumb", **(environment or {})}
        try:
            done = subprocess.run(
                [str(part) for part in command],
                cwd=self.project,
                env=clean,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise Failure(f"still running after {timeout} s: {command[0]}\n{error.output}") from error
        if done.returncode != 0:
            raise Failure(f"{command[0]} exited with {done.returncode}:\n{done.stdout}")
        return done.stdout


def terse_demo(box):
    """Options for the demo pair with answers of a line: to an agent that sets no bound, it would go on and on."""
    for role in ("target", "draft"):
        source, folder = ROOT / "models" / "demo" / role, box.folder / "demo" / role
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
        config = json.loads((source / "generation_config.json").read_text())
        # \u010a is how a line break is written in a byte-level vocabulary.
        breaks = [token_id for token, token_id in vocabulary.items() if "\u010a" in token]
        config["eos_token_id"] = [*config["eos_token_id"], *breaks]
        (folder / "generation_config.json").unlink()
        (folder / "generation_config.json").write_text(json.dumps(config))
    return ["--target", str(box.folder / "demo" / "target"), "--draft", str(box.folder / "demo" / "draft")]


def expect(condition, output):
    if not condition:
        raise Failure(output)


def call(name, arguments):
    """A tool call, as the scripted model's family writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


TASK = "Read note.txt and tell me the password."


def loop(name, arguments):
    """A script for a whole tool loop over TASK: the call, and the answer once its result stands in the prompt."""
    return [
        {"when": ["pelican-4711"], "say": "The password is pelican-4711, as the note says."},
        {"when": ["Tools:", TASK], "say": call(name, arguments)},
        {"when": [], "say": "Hello."},
    ]
