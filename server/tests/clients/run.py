#!/usr/bin/env python3
"""Drives real client programs against a Tandem server on loopback, with a dummy key.

    run.py --client NAME[,NAME...]|light|all [--scratch FOLDER]

Each one takes a turn with the demo pair, and a whole tool loop (call, result, answer) with a scripted model behind
the same server. It installs what it needs, in pinned versions, into the scratch folder, and needs a network for
that, Python 3.10 and, for the agents, Node 20. Build before:

    cargo build && cargo build -p tandem --example scripted

`light` are the packages that programs talk through; the agents take minutes.
"""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import aider  # noqa: E402
import claude_code  # noqa: E402
import codex  # noqa: E402
import continue_cli  # noqa: E402
import opencode  # noqa: E402
from packages import PACKAGES  # noqa: E402
from support import KEY, ROOT, Box, Failure, Server  # noqa: E402

AGENTS = {
    "codex": codex,
    "claude-code": claude_code,
    "opencode": opencode,
    "continue": continue_cli,
    "aider": aider,
}
CLIENTS = {**PACKAGES, **AGENTS}


def drive(name, client, options):
    box = Box(options.scratch, name)
    box.fresh()
    built = options.built
    command = [built / "tandem", "serve", "--port", "0", "--api-key", KEY, "--threads", "1"]
    if hasattr(client, "serve"):
        command += client.serve(box)
    with Server(command, {}) as server:
        client.turn(box, server.url)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=60)
        if code != 0:
            raise Failure(f"the server ended with {code} after SIGTERM")
    print(f"ok   {name}: a turn with the demo pair", flush=True)
    box.fresh()
    script = box.folder / "script.json"
    script.write_text(json.dumps(client.script(box)))
    with Server([built / "examples" / "scripted", script], {"TANDEM_API_KEY": KEY}) as server:
        client.tool_loop(box, server.url)
    print(f"ok   {name}: a tool loop with the script", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", required=True, help=", ".join(["light", "all", *CLIENTS]))
    parser.add_argument("--scratch", type=Path, default=ROOT / "target" / "clients")
    parser.add_argument("--built", type=Path, default=ROOT / "target" / "debug", help="where the binaries are")
    options = parser.parse_args()
    options.scratch = options.scratch.resolve()
    groups = {"light": list(PACKAGES), "all": list(CLIENTS)}
    if options.client == "light" and shutil.which("npm") is None:
        nodes = [name for name, package in PACKAGES.items() if package.npm]
        groups["light"] = [name for name in groups["light"] if name not in nodes]
        print(f"skip {', '.join(nodes)}: there is no npm", flush=True)
    failed = []
    for name in groups.get(options.client) or options.client.split(","):
        if name not in CLIENTS:
            parser.error(f"there is no client {name!r}; there are: {', '.join(CLIENTS)}")
        try:
            drive(name, CLIENTS[name], options)
        except Failure as failure:
            failed.append(name)
            print(f"FAIL {name}: {failure}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
