"""``alrp-triton verify``: that it passes here, that wrong backends would not pass, and how errors are measured."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dialect.interpreters import DYNAMO, start_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alrp_triton
from alrp_triton import cli, verify, verify_cases, verify_losses
from alrp_triton.engine.inputs import Levels
from alrp_triton.engine.labels import flatten_levels
from alrp_triton.engine.passes import numba_installed, triton_installed
from alrp_triton.engine.passes.eager import Eager
from alrp_triton.verify_cases import FULL, INTERPRETED, QUICK, Case

TIMES = ("early", "middle", "late")
BACKENDS = ("torch", *(["numba"] if numba_installed() else []), "reference")
NAMES = [
    *(*TIMES, "ties", "delta 0", "smooth"),
    *(f"{time} {dtype}" for dtype in ("float16", "bfloat16") for time in TIMES),
    *("middle float64", "pyramid", "infinities", *(f"detector {time}" for time in TIMES)),
    *("groups", "AP", "Rank & Sort", "NDCG", "AP groups", "Rank & Sort groups", "NDCG groups"),
]
FAMILY = ("AP", "Rank & Sort", "NDCG")
HALVES = (torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("command_environment")


class Ran(NamedTuple):
    """What a quick ``verify`` on the CPU has left."""

    status: int
    report: dict[str, Any]
    output: str

    @property
    def checks(self) -> list[dict[str, Any]]:
        return self.report["checks"]  # type: ignore[no-any-return]

    def of_case(self, name: str) -> dict[str, Any]:
        return next(check for check in self.checks if check["case"] == name)


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Ran:
        file = tmp_path / "report.json"
        status = cli.main(["verify", "--quick", "--device", "cpu", "--json", str(file), *arguments])
        return Ran(status, json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out)

    return run


@pytest.fixture
def missed(run: Run) -> Run:
    """Of the torch backend, which something is wrong with."""

    def missed() -> Ran:
        ran = run("--backend", "torch")
        assert ran.status == 1
        return ran

    return missed


def test_verify_passes(run: Run) -> None:
    status, report, output = run()
    assert status == 0
    assert report["misses"] == 0
    assert [(c["backend"], c["case"]) for c in report["checks"]] == [(b, n) for b in BACKENDS for n in NAMES]
    for check in report["checks"]:
        assert (check["status"], check["misses"], check["device"], check["same_bits"]) == ("ok", [], "cpu", True)
        assert 0 < check["milliseconds"] < 3_600_000
        assert all(0 <= check[name] <= 1e-6 for name in verify.ERRORS)
    # Figures are those of a comparison: float32 cannot hold the reference's numbers.
    assert all(check["score_gradient"] > 0 for check in report["checks"] if "float" not in check["case"])
    every = {"triton", "numba", "pairwise", "torch", "reference"}
    assert {c["backend"] for c in report["not_checked"]} == every - {*BACKENDS}
    assert {c["device"] for c in report["not_checked"]} == {"cpu"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"

    assert "MISS" not in output
    assert output.count(" ok ") == len(BACKENDS) * len(NAMES)
    assert f"{len(BACKENDS) * len(NAMES)} checks, 0 missed" in output
    for backend in ("triton", "pairwise"):
        reason = "Triton runs on GPUs" if triton_installed() else "Triton is not installed"
        assert f"not checked: {backend} on cpu: {reason}" in output
    assert ("alrp-triton verify --interpret" in output) == triton_installed()


@pytest.mark.xdist_group("processes")
def test_verify_as_a_module() -> None:
    code = "import runpy; runpy.run_module('alrp_triton.cli', run_name='__main__', alter_sys=True)"
    done = start_python(code, "verify", "--quick", "--backend", "torch", "--device", "cpu", given=DYNAMO)
    assert done.returncode == 0, done.stderr
    assert f"{len(NAMES)} checks, 0 missed" in done.stdout
    assert "reference on" not in done.stdout


def change_gradient(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Have the torch backend's gradients changed before they are rounded to half precision."""
    original = Eager.write

    def wrong(passes: Eager, levels: Levels, *arguments: Any) -> list[Tensor]:
        if type(passes) is not Eager:
            return original(passes, levels, *arguments)
        dtype = levels.logits[0].dtype
        logits = [level.float() if dtype in HALVES else level for level in levels.logits]
        return [change(g).to(dtype) for g in original(passes, levels._replace(logits=logits), *arguments)]

    monkeypatch.setattr(Eager, "write", wrong)


def test_a_wrong_gradient_is_a_miss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    change_gradient(monkeypatch, lambda gradient: gradient * (1 + 1e-4))
    status, report, output = ran = run()
    assert status == 1
    assert {check["status"] for check in ran.checks if check["backend"] == "reference"} == {"ok"}
    by_torch = [check for check in ran.checks if check["backend"] == "torch"]
    missed = [check for check in by_torch if check["status"] == "MISS"]
    # bfloat16 is so coarse that few numbers are rounded otherwise.
    assert {check["case"] for check in by_torch if check["status"] == "ok"} <= {f"{t} bfloat16" for t in TIMES}
    assert report["misses"] == len(missed)
    middle = next(check for check in missed if check["case"] == "middle")
    assert middle["score_gradient"] == pytest.approx(1e-4, rel=0.01)
    assert middle["misses"][0].startswith("score gradient 1.0e-04 (allowed 1e-06)")
    assert "MISS: middle, torch on cpu: score gradient 1.0e-04 (allowed 1e-06)" in output
    assert f"{len(ran.checks)} checks, {len(missed)} missed" in output


def test_one_wrong_element_is_a_miss(missed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(gradient: Tensor) -> Tensor:
        # By hardly anything in terms of the norm.
        gradient[(0,) * gradient.dim()] += 2e-6 * gradient.abs().max()
        return gradient

    change_gradient(monkeypatch, change)
    check = missed().of_case("middle")
    assert check["score_gradient"] < 1e-6 < check["worst"]


@pytest.mark.parametrize("name", ["cls", "loc", "rank", "loc_gradient"])
def test_a_wrong_loss_is_a_miss(name: str, missed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(loss: str, logits: Any, labels: Any, errors: Tensor, **arguments: Any) -> Any:
        if name == "loc_gradient":
            errors = errors + 1e-5 * (errors - errors.detach())
            return verify_losses.compute(loss, logits, labels, errors, **arguments)
        out = alrp_triton.ALRPLossOutput(*verify_losses.compute(loss, logits, labels, errors, **arguments))
        value = getattr(out, name)
        return out._replace(**{name: value + 2e-6 * value.detach()})

    monkeypatch.setattr(verify, "compute", wrong)
    # Not all losses of the family tell ranks, or have a part for the boxes.
    checks = [check for check in missed().checks if name == "cls" or not check["case"].startswith(FAMILY)]
    assert len(checks) >= 19
    for check in checks:
        assert check["misses"] == [f"{name.replace('_', ' ')} {check[name]:.1e} (allowed 1e-06)"]
        assert check[name] == pytest.approx(1e-5 if name == "loc_gradient" else 2e-6, rel=0.1)


def test_other_bits_in_another_run_are_a_miss(missed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    def change(gradient: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        # The sign of a zero: equal numbers, other bits.
        gradient[gradient == 0] = 0.0 if runs % 2 else -0.0
        return gradient

    change_gradient(monkeypatch, change)
    ran = missed()
    middle = ran.of_case("middle")
    assert middle["same_bits"] is False
    assert middle["misses"] == ["two runs differ in their bits"]
    assert "MISS: middle, torch on cpu: two runs differ in their bits" in ran.output


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_miss_and_null_in_json(
    value: float, missed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_gradient(monkeypatch, lambda gradient: torch.full_like(gradient, value))
    for check in missed().checks:
        assert check["score_gradient"] is None
        assert "score gradient inf (allowed 1e-06)" in check["misses"]


def test_a_backend_that_raises_is_a_miss(missed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Eager, "count", broken)
    ran = missed()
    assert {check["status"] for check in ran.checks} == {"MISS"}
    assert "MISS: ties, torch on cpu: RuntimeError: no kernel image is available" in ran.output


def test_missing_detector_logits_are_a_miss(missed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_cases.resources, "files", lambda package: tmp_path)
    verify_cases.cases.cache_clear()
    try:
        ran = missed()
    finally:
        verify_cases.cases.cache_clear()
    assert [check["case"] for check in ran.checks if check["status"] == "MISS"] == ["detector"]
    missing = f"{tmp_path / 'data' / 'detector_logits.npz'} is missing"
    assert f"MISS: detector, torch on cpu: {missing}" in ran.output


def test_a_backend_that_was_asked_for_and_cannot_run_is_a_miss(run: Run) -> None:
    status, report, output = run("--backend", "triton")
    assert (status, report["checks"], report["misses"]) == (1, [], 1)
    assert "MISS: triton could not be checked anywhere" in output


# In the place of Python: what runs the module that it is given, but with some of the cases.
FEWER = """#!{executable}
import runpy, sys, warnings
from alrp_triton import verify_cases
cases = verify_cases.cases
verify_cases.cases = lambda size: cases(size)[::{every}]
warnings.simplefilter("ignore", RuntimeWarning)
options = sys.argv[1:5]
del sys.argv[1:5]
assert options[::2] == ["-W", "-m"]
runpy.run_module(options[3], run_name="__main__", alter_sys=True)
"""


@pytest.mark.nightly
@pytest.mark.thinned(2)
@pytest.mark.skipif(not triton_installed(), reason="needs Triton")
@pytest.mark.parametrize("every", [6, 1])
def test_interpret_checks_the_triton_backends(
    every: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if every > 1:
        script = tmp_path / "python"
        script.write_text(FEWER.format(executable=sys.executable, every=every))
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))
    status, report, _ = run("--interpret", "--backend", "triton")
    assert status == 0, report
    expected = [("triton", "cpu", name) for name in NAMES[::every]]
    assert [(c["backend"], c["device"], c["case"]) for c in report["checks"]] == expected
    assert report["not_checked"] == []


def test_an_interpreter_that_fails_is_a_miss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    status, report, _ = run("--interpret", "--backend", "triton", "--backend", "torch")
    assert status == 1
    failed = [check for check in report["checks"] if check["status"] == "MISS"]
    assert [check["backend"] for check in failed] == ["triton"]
    assert failed[0]["misses"] == ["Triton's interpreter: exit status 1"]


def test_what_is_not_installed_is_not_interpreted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from alrp_triton.engine import passes

    monkeypatch.setattr(passes, "numba_installed", lambda: False)
    _, report, _ = run("--interpret", "--backend", "numba", "--backend", "torch", "--quick")
    assert {check["backend"] for check in report["checks"]} == {"torch"}
    assert [entry["backend"] for entry in report["not_checked"]] == ["numba"]


@pytest.mark.parametrize("size", [FULL, QUICK, INTERPRETED])
def test_cases_are_worth_checking(size: verify_cases.Size) -> None:
    cases = verify_cases.cases(size)
    assert [case.name for case in cases] == NAMES
    for case in cases:
        groups = [case.arguments["groups"]] if "groups" in case.arguments else []
        levels = Levels(case.logits, case.labels, groups)
        assert sum(level.numel() for level in case.logits) <= 2 * size.logits
        exact = case.exact
        flat_logits, flat_labels, flat_groups = flatten_levels(levels)
        for value in exact if case.loss == "aLRP" else (exact.cls, exact.grad_logits):
            assert value.isfinite().all()
            assert value.any()
        assert (exact.grad_logits[flat_labels == 1] < 0).any()
        assert (exact.grad_logits[flat_labels == 0] > 0).any()
        assert (exact.grad_logits[flat_labels == -1] == 0).all()
        assert (flat_labels == -1).any()
        # The engine reads labels as the cases do.
        assert groups == [] or flat_groups.equal(groups[0])
        expected = verify_losses.exact(case.loss, flat_logits, flat_labels, case.loc_errors, **case.arguments)
        assert all(one.equal(other) for one, other in zip(expected, exact))


def test_cases_are_what_they_are_called() -> None:
    cases = {case.name: case for case in verify_cases.cases(FULL)}
    assert all(case.logits[0].dtype == torch.float32 for name, case in cases.items() if "float" not in name)
    assert cases["middle float16"].logits[0].dtype == torch.float16
    assert cases["late bfloat16"].logits[0].dtype == torch.bfloat16
    ties, positive = cases["ties"].logits[0], cases["ties"].labels[0] == 1
    assert len(ties[positive].unique()) < len(ties[positive])
    assert torch.isin(ties[positive], ties[cases["ties"].labels[0] == 0]).any()
    assert cases["delta 0"].arguments == {"delta": 0.0}
    assert cases["smooth"].arguments == {"loc_ranking": "smooth"}
    infinite, positive = cases["infinities"].logits[0], cases["infinities"].labels[0] == 1
    for value in (math.inf, -math.inf):
        assert (infinite[positive] == value).any()
        assert (infinite[cases["infinities"].labels[0] == 0] == value).any()
    pyramid = cases["pyramid"]
    assert len(pyramid.logits) == 3
    assert not pyramid.logits[0].is_contiguous()
    assert pyramid.logits[0].isnan().any()
    assert pyramid.labels[0].shape == pyramid.logits[0].shape[:-1]
    assert cases["detector early"].logits[0].shape[1:] == (10,)


def neighbour(value: Tensor, up: bool) -> Tensor:
    """The next number of a half-precision dtype."""
    steps = value.view(torch.int16).int()
    ordered = torch.where(steps < 0, -(steps & 0x7FFF), steps) + (1 if up else -1)
    return torch.where(ordered < 0, -ordered | 0x8000, ordered).to(torch.int16).view(value.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@settings(deadline=None)
@given(value=st.floats(-1e4, 1e4), up=st.booleans())
def test_only_the_nearest_number_is_free_of_error(dtype: torch.dtype, value: float, up: bool) -> None:
    exact = torch.tensor([value, 5e4], dtype=torch.float64)
    nearest = exact.to(dtype)
    # To float64 first, so that the second element is exact.
    exact[1] = nearest[1].double()
    assert verify.relative_errors(nearest, exact) == (0, 0)
    other = nearest.clone()
    other[:1] = neighbour(nearest[:1], up)
    # The middle between two neighbours may go to either.
    missing = (other[0].double() - exact[0]).abs() - (other[0].double() - nearest[0].double()).abs() / 2
    _, worst = verify.relative_errors(other, exact)
    assert worst * float(exact.abs().max()) == pytest.approx(float(missing), rel=1e-6, abs=1e-300)


def all_of(dtype: torch.dtype) -> Tensor:
    """Every finite number of a half-precision dtype, ascending."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()].double().unique()


@pytest.mark.parametrize("dtype", HALVES)
def test_between_all_numbers_of_half_precision(dtype: torch.dtype) -> None:
    numbers = all_of(dtype)
    low, high = numbers[:-1], numbers[1:]
    for share, to_low, to_high in ((0.25, 0, 0.25), (0.5, 0, 0), (0.75, 0.25, 0)):
        exact = low + share * (high - low)
        for neighbours, expected in ((low, to_low), (high, to_high)):
            found = (neighbours - exact).abs() - verify._rounding(neighbours, exact, torch.finfo(dtype))
            torch.testing.assert_close(found.clamp(min=0), expected * (high - low), rtol=0, atol=0)


def test_relative_errors() -> None:
    exact = torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
    assert verify.relative_errors(exact.float(), exact) == (0, 0)
    assert verify.relative_errors(exact.float() + torch.tensor([[0, 0.5], [0, 0]]), exact) == (0.1, 0.125)
    assert verify.relative_errors(exact[0].float(), exact) == (math.inf, math.inf)
    for value in (math.nan, math.inf):
        assert verify.relative_errors(torch.full((2, 2), value), exact) == (math.inf, math.inf)
    zero = torch.zeros(2, dtype=torch.float64)
    assert verify.relative_errors(torch.tensor([0.0, -0.0]), zero) == (0, 0)
    assert verify.relative_errors(torch.tensor([0.0, 1e-30]), zero) == (math.inf, math.inf)
    assert verify.relative_errors(torch.empty(0), zero[:0]) == (0, 0)


def test_a_missing_case_is_never_run() -> None:
    check = verify.Check(Case("gone", [], [], torch.empty(0), missing="it is gone"), "torch", torch.device("cpu"), 1)
    assert check.run().misses == ["it is gone"]
    assert check.run().status == "MISS"
