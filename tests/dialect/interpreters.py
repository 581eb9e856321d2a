"""Code run in a new interpreter, and what that interpreter is made to believe of where it runs."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# "Unix-specific services" of Python's library reference, and what else there is on no Windows.
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "curses")
POSIX_FUNCTIONS = (
    *("fork", "forkpty", "register_at_fork", "wait", "wait3", "wait4", "getuid", "geteuid", "getgid", "getpgid"),
    *("killpg", "setsid", "nice", "uname", "getloadavg", "sched_getaffinity", "sched_setaffinity", "sched_yield"),
    *("sysconf", "confstr", "mkfifo", "chown", "fchmod", "statvfs", "pread", "sendfile", "openpty", "memfd_create"),
)
# With what torch imports when an operator is first called.
DYNAMO = "import torch._dynamo"
# What takes long to import.
PRELOADED = [
    *("torch._dynamo", "torch.nn.parallel.distributed", "alrp_triton.engine.operators", "hypothesis"),
    *(f"alrp_triton.engine.passes.{name}" for name in ("tables", "eager", "numba")),
    # What numba imports when something is compiled.
    *("scipy.linalg", "numba.experimental.jitclass.base", "numba.np.polynomial", "numba.np.random.generator_methods"),
    *("numba.np.linalg", "numba.cpython.randomimpl", "numba.typed.typeddict", "numba.core.typing.cffi_utils"),
]

# After what is given first: for each task on standard input a child, which does it as if it were alone.
_SERVER = """
import json as _json, os as _os, sys as _sys
for _line in _sys.stdin:
    _child = _os.fork()
    if not _child:
        _task = _json.loads(_line)
        _os.environ.clear()
        _os.environ.update(_task["env"])
        _sys.path[:0] = _task["path"]
        _sys.argv[1:] = _task["arguments"]
        _os.chdir(_task["cwd"])
        for _number, _name in enumerate(("in", "out", "err")):
            _file = _os.open(_task[_name], _os.O_RDWR)
            _os.dup2(_file, _number)
            _os.close(_file)
        break
    _status = _os.waitpid(_child, 0)[1]
    print(_os.waitstatus_to_exitcode(_status), flush=True)
else:
    _os._exit(0)
_code = compile(_task["code"], "<string>", "exec")
for _name in set(globals()) & {"_json", "_os", "_sys", "_line", "_child", "_task", "_number", "_file", "_status"}:
    del globals()[_name]
del _name
exec(_code)
"""


@functools.cache
def _server(given: str, options: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, *options, "-c", given + _SERVER]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert server.stdin is not None
    atexit.register(server.communicate)  # which closes its input, whereupon it ends
    return server


def start_python(
    code: str,
    *arguments: str,
    given: str = "import torch",
    cwd: Path | str | None = None,
    path: Sequence[Path | str] = (),
    options: Sequence[str] = (),
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own that has done nothing but what is ``given``, and that finds packages in
    ``path`` first, else where this one does. Where there is ``fork``, what is given is done once for all of them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    env.pop("PYTHONPATH", None)
    if not hasattr(os, "fork"):
        if path:
            env["PYTHONPATH"] = os.pathsep.join(map(str, path))
        command = [sys.executable, *options, "-c", f"{given}\n{code}", *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", check=False)
    server = _server(given, tuple(options))
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        files = {"in": os.devnull, "out": out.name, "err": err.name}
        where = {"cwd": str(cwd or Path.cwd()), "path": list(map(str, path))}
        task = {"code": code, "arguments": arguments, "env": env, **where, **files}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, f"the server of {given!r} has ended"
        stdout, stderr = (file.read().decode("utf-8") for file in (out, err))
    return subprocess.CompletedProcess([given, code, *arguments], int(status), stdout, stderr)


def run_python(code: str, **settings: Any) -> str:
    """What ``code`` prints in such a process (:func:`start_python`); nothing else may be printed, warnings included."""
    done = start_python(code, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def new_processes() -> Any:
    """What makes processes that are new but for what takes long to import; where there is no fork, all new."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def without(*packages: str) -> str:
    """Code that makes an interpreter find none of ``packages``, as where they are not installed."""
    return f"""
import importlib.machinery
find_spec = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {packages!r} else find_spec(name, path, target)
importlib.machinery.PathFinder.find_spec = find_others
"""


# What torch imports when an operator is first called included, as where Triton is not installed.
WITHOUT_TRITON = without("triton") + "import torch._dynamo"
WITHOUT_EXTRAS = without("triton", "numba") + "import torch._dynamo"


def pretend(platform: str) -> str:
    """Code that, after ``WITHOUT_TRITON``, makes an interpreter believe that it runs on ``platform``, ``"win32"`` or
    ``"darwin"``, as far as Python tells: with none of what is only on POSIX; on macOS without what is only on Linux."""
    windows = platform == "win32"
    modules = POSIX_MODULES if windows else ()
    functions = POSIX_FUNCTIONS if windows else ("sched_getaffinity", "sched_setaffinity", "memfd_create")
    return f"""
import os, pathlib, platform, sys
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
