"""What importing the package does and needs, on which system, checked in separate processes and by reading the code."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest
from dialect.interpreters import POSIX_FUNCTIONS, POSIX_MODULES, WITHOUT_EXTRAS, WITHOUT_TRITON, pretend, run_python

import alrp_triton

ROOT = Path(__file__).resolve().parent.parent
# Ranks 2 and 3; one false positive, at 2.0, above both: cls = (1/2 + 1/3)/2, loc = (0.2/2 + (0.4 + 0.2)/3)/2. The
# positives lose (1/2)/2 and ((1 + 0.2)/3)/2, which the false positive receives. (torch.testing compares by more than
# every PyTorch has.)
STEP = """
for backend in ("auto", "torch", "reference"):
    logits = torch.tensor([0.5, -0.5, 0.25, 2.0], requires_grad=True)
    labels = torch.tensor([1, 0, 1, 0])
    arguments = (logits, labels, torch.tensor([0.2, 0.4]))
    output = alrp_triton.alrp_loss(*arguments, delta=0, backend=backend, process_group=None)
    (output.cls + output.loc).backward()
    assert torch.allclose(output.cls, torch.tensor(5 / 12))
    assert torch.allclose(output.loc, torch.tensor(0.15))
    assert torch.allclose(logits.grad, torch.tensor([-0.25, 0, -0.2, 0.45]))
"""


# Counts the calls of functions in Python while torch is imported.
COUNTED = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
import torch
sys.setprofile(None)
"""
# What is given to several processes is done once for those of one pytest-xdist worker.
by_one_worker = pytest.mark.xdist_group("imports")


@by_one_worker
def test_import_is_quiet_and_light(tmp_path: Path) -> None:
    code = """
before = set(sys.modules)
import alrp_triton
added = set(sys.modules) - before
tops = {name.partition(".")[0] for name in added}
heavy = {"triton", "torchvision", "rich", "numba", "sympy", "matplotlib", "scipy", "pandas"}
assert not heavy & tops, heavy & tops
assert not torch.cuda.is_initialized()
assert tops - set(sys.stdlib_module_names) <= {"alrp_triton", "torch", "numpy"}, tops
# Of torch, only what it has not imported by itself counts.
heavy = ("_dynamo", "_inductor", "_export", "export", "compiler", "distributed", "fx", "onnx", "jit", "package",
         "testing", "profiler", "ao", "quantization", "multiprocessing", "utils.data", "utils.tensorboard",
         "utils.benchmark", "utils.cpp_extension", "utils.checkpoint")
heavy = tuple(f"torch.{name}" for name in heavy)
found = sorted(name for name in added if name in heavy or name.startswith(tuple(f"{module}." for module in heavy)))
assert not found, found
assert all(hasattr(alrp_triton, name) for name in alrp_triton.__all__)
assert len(set(alrp_triton.__all__)) == len(alrp_triton.__all__)
"""
    assert run_python(code, given=COUNTED, cwd=tmp_path) == ""


@by_one_worker
def test_import_takes_little_beside_that_of_torch(tmp_path: Path) -> None:
    """In time, a twentieth, most of it to register operators. What it does is counted instead, which does not depend on
    what else the machine does; what torch imports only when asked would show."""
    code = """
of_torch, calls = calls, 0
sys.setprofile(count)
import alrp_triton
sys.setprofile(None)
print(calls / of_torch)
"""
    assert 0 < float(run_python(code, given=COUNTED, cwd=tmp_path)) < 0.1


@pytest.mark.nightly
def test_import_and_a_step_warn_of_nothing(tmp_path: Path) -> None:
    given = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._dynamo  # as PyTorch does when an operator is first called
    import importlib.util
    if importlib.util.find_spec("numba"):
        import numba  # which reads what the system says of the processor, in any encoding
"""
    code = f"""
import torch
warnings.simplefilter("error")
import alrp_triton
{STEP}
warnings.resetwarnings()
warnings.simplefilter("ignore")
"""
    assert run_python(code, given=given, cwd=tmp_path, options=["-X", "warn_default_encoding"]) == ""


@by_one_worker
def test_works_without_triton(tmp_path: Path) -> None:
    code = f"""
import sys
import torch
import alrp_triton
{STEP}
for backend in ("triton", "pairwise"):
    try:
        alrp_triton.alrp_loss(*arguments, backend=backend)
    except ValueError as error:
        print(error)
assert "triton" not in sys.modules
"""
    lines = run_python(code, given=WITHOUT_TRITON, cwd=tmp_path, TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 2
    for line, backend in zip(lines, ["triton", "pairwise"]):
        assert repr(backend) in line
        assert "Triton is not installed" in line


@pytest.mark.thinned(2)
@by_one_worker
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_works_on_other_systems(tmp_path: Path, platform: str) -> None:
    """As far as one can tell without one: what needs neither Triton nor an extra is imported, and a step is done."""
    backends = tuple(f"engine/passes/{name}" for name in ("gpu", "numba"))
    apart = ("kernels/", "benchmarks/", "integrations/", "metrics/matching.py", "metrics/torchmetrics.py", *backends)
    package = Path(alrp_triton.__file__).parent
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    modules = [name[:-3].replace("/", ".") for name in files if not name.startswith(apart) and "__" not in name]
    assert len(modules) > 30
    code = f"""
import importlib
import alrp_triton
{STEP}
for name in {modules!r}:
    importlib.import_module(f"alrp_triton.{{name}}")
print(alrp_triton.info._host_memory() is None, "triton" in sys.modules)
"""
    expected = f"{platform == 'win32'} False\n"
    assert run_python(pretend(platform) + code, given=WITHOUT_EXTRAS, cwd=tmp_path) == expected


@pytest.mark.nightly
def test_works_where_torch_has_no_distributed(tmp_path: Path) -> None:
    """PyTorch can be built without it, and knows of that by what is deleted here first."""
    code = f"""
import sys
import torch
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
del torch._C._c10d_init, torch.distributed
sys.modules["torch._C._distributed_c10d"] = None
import torch.distributed
assert not torch.distributed.is_available() and not hasattr(torch.distributed, "all_reduce")
# A stub, of which only PyTorch itself is to know.
stub = torch.distributed.ProcessGroup
del torch.distributed.ProcessGroup
import alrp_triton
rows = torch.zeros(1, requires_grad=True), torch.ones(1, dtype=torch.int64)
for group in (True, object()):
    try:
        alrp_triton.ap_loss(*rows, process_group=group)
    except ValueError as error:
        print(error)
torch.distributed.ProcessGroup = stub
{STEP}
"""
    error = "process_group: expected a PyTorch that has torch.distributed; this one was built without\n"
    assert run_python(code, cwd=tmp_path) == 2 * error


def test_nothing_only_on_posix_is_needed_for_importing() -> None:
    posix = {*POSIX_MODULES, *(f"os.{name}" for name in POSIX_FUNCTIONS)}
    found = []
    for path, tree in sources():
        for node in at_import(tree):
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                module = node.module or ""
                names = [module.partition(".")[0], *(f"{module}.{alias.name}" for alias in node.names)]
            found += [f"{path}: {name}" for name in names if name in posix]
    assert not found


def test_text_is_read_and_written_in_one_encoding() -> None:
    found = [f"{path}:{call.lineno}: {ast.unparse(call)}" for path, tree in sources() for call in calls_as_text(tree)]
    assert not found


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("alrp_triton", "kernels", "benchmarks", "examples", "docs"):
        files = list((ROOT / folder).rglob("*.py"))
        assert files
        for path in files:
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What of a module is executed when it is imported: everything but functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import(child)


def calls_as_text(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text in an encoding that depends on the system."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        positional = len(call.args)
        modes = {argument.value for argument in [given.get("mode"), *call.args] if isinstance(argument, ast.Constant)}
        binary = any(isinstance(mode, str) and re.fullmatch("[rwax][+]?b[+]?", mode) for mode in modes)
        if name in ("open", "fdopen"):
            text = not binary
        elif name in ("NamedTemporaryFile", "TemporaryFile"):  # binary unless told
            text = bool(modes) and not binary
        elif name in ("read_text", "write_text"):  # an encoding without its name comes first, or after the text
            text = positional <= ("write" in name)
        elif name in ("run", "Popen", "call", "check_call", "check_output"):
            text = "text" in given or "universal_newlines" in given
        else:
            text = False
        if text and "encoding" not in given:
            yield call


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git which files are tracked")
def test_file_names_are_for_every_system() -> None:
    # "safe.directory" lets git read a checkout that belongs to another user, as in containers.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    names = [name for name in listed.split("\0") if name]
    assert len(names) > 100
    parts = {part for name in names for part in name.split("/")}
    assert not [part for part in parts if not part.isascii() or set(part) & set('<>:"|?*\\') or part[-1] in " ."]
    # con, nul.txt and the like
    assert not [part for part in parts if PureWindowsPath(part).is_reserved()]
    folded = [name.casefold() for name in names]
    assert not {name for name in folded if folded.count(name) > 1}
