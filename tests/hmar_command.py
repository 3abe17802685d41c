"""The command `hmar` within this process, without the seconds that a new one takes to start."""

import contextlib
import io
import subprocess
import sys

import pytest

from hmar.cli import main


def hmar_here(*arguments, cwd=None):
    """What subprocess.run would return for `hmar` with these arguments."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["hmar", *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd or "."),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())
