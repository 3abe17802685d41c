"""Runs a script in a process of its own, where Triton compiles instead of interpreting."""

import json
import os
import subprocess
import sys


def answer(script: str, *arguments: str):
    """What the script prints, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
