"""Code run in a new interpreter, and what that interpreter is made to believe of where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# "Unix-specific services" of Python's library reference, and what else there is on no Windows.
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "curses")
POSIX_FUNCTIONS = (
    *("fork", "forkpty", "register_at_fork", "wait", "wait3", "wait4", "getuid", "geteuid", "getgid", "getpgid"),
    *("killpg", "setsid", "nice", "uname", "getloadavg", "sched_getaffinity", "sched_setaffinity", "sched_yield"),
    *("sysconf", "confstr", "mkfifo", "chown", "fchmod", "statvfs", "pread", "sendfile", "openpty", "memfd_create"),
)


def run_python(code: str, cwd: Path, path: Path | None = None, options: Sequence[str] = (), **env: str) -> str:
    """What ``code`` prints in a new interpreter, which finds packages in ``path`` first, else where this one does;
    nothing else may be printed, warnings included."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def without(*packages: str) -> str:
    """Code that makes an interpreter find none of ``packages``, as where they are not installed."""
    return f"""
import importlib.machinery
find_spec = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {packages!r} else find_spec(name, path, target)
importlib.machinery.PathFinder.find_spec = find_others
"""


def pretend(platform: str) -> str:
    """Code that imports torch, as what it is, with what that imports when an operator is first called; and then makes
    an interpreter believe that it runs on ``platform``, ``"win32"`` or ``"darwin"``, as far as Python tells: without
    Triton, and with none of what is only on POSIX; on macOS without what is only on Linux."""
    windows = platform == "win32"
    modules = POSIX_MODULES if windows else ()
    functions = POSIX_FUNCTIONS if windows else ("sched_getaffinity", "sched_setaffinity", "memfd_create")
    return f"""{without("triton")}
import os, pathlib, platform, sys
import torch._dynamo
sys.platform, os.name = {platform!r}, {"nt" if windows else "posix"!r}
# What pathlib chooses by that name, so that it goes on finding files.
sys.modules[pathlib.Path.__module__].WindowsPath = pathlib.PosixPath
platform.system = lambda: {"Windows" if windows else "Darwin"!r}
for name in {modules!r}:
    sys.modules[name] = None
for name in {functions!r}:
    if hasattr(os, name):
        delattr(os, name)
"""
