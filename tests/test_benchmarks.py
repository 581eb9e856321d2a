"""The benchmark suite: whom it refuses, what it runs, how it resumes, and the command."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alrp_triton.benchmarks import rows, suite, timing
from alrp_triton.benchmarks.accuracy import LARGEST_ERROR, why_wrong
from alrp_triton.benchmarks.measure import measure
from alrp_triton.benchmarks.peers import BUCKETED, Contender
from alrp_triton.benchmarks.workloads import REGIMES, Case, Inputs, make_inputs
from benchmarking import SMALL, eager, right, setting
from interpreters import start_python
from torch import Tensor

from alrp_triton import cli

ROOT = Path(__file__).resolve().parent.parent


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def slightly_wrong(inputs: Inputs) -> Tensor:
    return _Scaled.apply(right(inputs), 1.00001)


def one(contender: Contender, case: Case = SMALL, **changes) -> rows.Row:
    (row,) = measure(case, [contender], setting()._replace(**changes))
    return row


def test_a_right_contender_is_timed() -> None:
    row = one(Contender("right", right, True))
    assert row.status == "ok"
    assert row.both_ms > 0
    assert row.forward_ms > 0
    assert row.backward_ms > 0
    assert row.error < LARGEST_ERROR
    assert row.bandwidth_share == pytest.approx(row.floor_bytes / (row.both_ms / 1e3) / 1e10)
    assert row.floor_ratio == pytest.approx(1 / row.bandwidth_share)
    assert row.floor_bytes == 12 * row.logits


def test_a_wrong_contender_is_refused() -> None:
    row = one(Contender("wrong", slightly_wrong, True))
    assert row.status == "refused"
    assert row.both_ms is None
    assert row.error == pytest.approx(1e-5, rel=0.1)
    assert "1.0e-05" in row.note


def test_a_contender_that_claims_nothing_is_timed_with_its_error() -> None:
    row = one(Contender("wrong", slightly_wrong, False))
    assert row.status == "ok"
    assert row.both_ms > 0
    assert row.error == pytest.approx(1e-5, rel=0.1)


def test_nan_is_refused() -> None:
    row = one(Contender("nan", lambda inputs: right(inputs) * math.nan, None))
    assert (row.status, row.both_ms) == ("refused", None)
    row = one(Contender("nan gradient", lambda inputs: _Scaled.apply(right(inputs), math.nan), False))
    assert (row.status, row.both_ms) == ("refused", None)


def test_wrong_at_full_size_only_is_refused() -> None:
    def loss(inputs: Inputs) -> Tensor:
        # What the reference is given is small; beyond that something is left out, as by an index that overflows.
        value = right(inputs)
        return value if inputs.case.logits < 1000 else value + inputs.levels[0].flatten()[:10].sum() * 1e-3

    contender = Contender("overflowing", loss, True)
    row = one(contender, Case("proposals", image=64, batch=2, num_positives=10), reference_pairs=1000)
    assert row.error_logits < 1000 < row.logits
    assert row.error < LARGEST_ERROR
    assert (row.status, row.both_ms) == ("refused", None)
    assert "differ" in row.note
    inputs = make_inputs(SMALL)
    assert why_wrong(contender, inputs, torch.zeros(())) == "the gradient is missing or not finite"


def test_half_precision_may_round_and_nothing_else() -> None:
    case = SMALL._replace(dtype="bfloat16")
    assert one(Contender("right", right, True), case).status == "ok"
    row = one(Contender("wrong", lambda inputs: _Scaled.apply(right(inputs), 1.01), True), case)
    assert (row.status, row.both_ms) == ("refused", None)


def test_a_failure_stops_nobody_else() -> None:
    def broken(inputs: Inputs) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    found = list(measure(SMALL, [Contender("broken", broken, True), Contender("right", right, True)], setting()))
    assert [(row.contender, row.status) for row in found] == [("broken", "failed"), ("right", "ok")]
    assert found[0].note == "RuntimeError: no kernel"
    (row,) = measure(SMALL._replace(num_positives=10**6), [Contender("right", right, True)], setting())
    assert row.status == "skipped"
    assert "num_positives" in row.note


def test_too_much_work_is_skipped_or_scaled() -> None:
    def work(case: Case) -> int:
        return case.positives * case.logits

    most = SMALL.logits * 4.5
    row = one(Contender("slow", right, True, work, (most, most)))
    assert (row.status, row.both_ms) == ("skipped", None)
    row = one(Contender("one by one", right, True, work, (most, most), by_positive=True))
    assert row.status == "ok"
    assert row.note == "forward timed with 4 of 12 positives and scaled"
    assert row.both_ms == pytest.approx(row.forward_ms + row.backward_ms)
    assert one(Contender("slow", right, True, work, (1.0, 1.0), by_positive=True)).status == "skipped"


def test_turns_and_medians() -> None:
    inputs, order = make_inputs(SMALL), []

    def loss(name: str):
        def run(given: Inputs) -> Tensor:
            assert given.levels[0].grad is None
            order.append(name)
            return right(given)

        return run

    times = timing.cpu_turns({"a": (loss("a"), inputs, 3), "b": (loss("b"), inputs, 1)})
    assert order == ["a", "b", "a", "a"]
    assert [len(times[name].both) for name in "ab"] == [3, 1]
    assert inputs.levels[0].grad is None
    assert timing.middle([1.0, 2.0, 3.0, 4.0, 10.0]) == (3.0, 2.0)
    assert timing.repeats_for(1.0, 5.5, 10) == 5
    assert timing.repeats_for(100.0, 5.5, 10) == 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Contender]]:
    """Two contenders, which are known to the suite in the place of all."""
    known = {name: Contender(name, right, True) for name in ("ours, torch", "right")}
    monkeypatch.setattr(suite, "contenders", lambda device: known)
    return known


DESCRIBED = ["--head", "atss", "--image", "32", "--batch", "2", "--positives", "12", "--seconds", "0.01"]


def test_resuming(tmp_path: Path, few: dict[str, Contender], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    arguments = [*DESCRIBED, "--output", str(path), "--regime", "late"]
    assert suite.main(arguments) == 0
    assert path.read_text().count("\n") == 3
    assert suite.main([*arguments, "--resume"]) == 0
    assert "0 rows appended" in capsys.readouterr().out
    assert path.read_text().count("\n") == 3
    # Another case, and what failed, are run; so is everything without the option, or with other versions.
    assert suite.main([*arguments, "middle", "--resume"]) == 0
    assert path.read_text().count("\n") == 5
    rows.append(path, dataclasses.replace(rows.read([path])[0], status="failed"))
    assert suite.main([*arguments, "--resume"]) == 0
    assert path.read_text().count("\n") == 7
    assert suite.main(arguments) == 0
    assert path.read_text().count("\n") == 9
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    assert suite.main([*arguments, "--resume"]) == 0
    assert path.read_text().count("\n") == 11


def test_each_row_is_on_disk_at_once(tmp_path: Path, few: dict[str, Contender]) -> None:
    path = tmp_path / "out.csv"
    planned = [(SMALL._replace(regime=regime), list(few.values()), False) for regime in REGIMES]
    for k, _ in enumerate(suite.run(planned, setting(), path, resume=False)):
        assert len(path.read_text().splitlines()) == k + 2


def test_status_tells_of_a_wrong_backend(
    tmp_path: Path, few: dict[str, Contender], capsys: pytest.CaptureFixture[str]
) -> None:
    few["ours, torch"] = Contender("ours, torch", slightly_wrong, True)
    assert suite.main([*DESCRIBED, "--output", str(tmp_path / "out.csv")]) == 1
    assert "REFUSED: ours, torch: the gradient is off" in capsys.readouterr().out


def test_choice_of_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def listed(*arguments: str) -> list[str]:
        assert suite.main([*arguments, "--device", "cpu", "--list"]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(listed("--head", "atss", "lvis", "--regime", "early", "late", "--dtype", "bfloat16")) == 4
    assert all("bfloat16" in line for line in listed("--preset", "full", "--dtype", "bfloat16"))
    assert all(line.endswith(f": {BUCKETED}") for line in listed("--contender", "means"))
    assert len(listed()) == len(listed("--preset", "cpu")) > 5
    assert suite.main(["--preset", "smoke", "--head", "lvis", "--device", "cpu"]) == 1
    assert "nothing to run" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    assert suite.main([*DESCRIBED, "--device", "cpu", "--output", str(other)]) == 1
    assert "other columns" in capsys.readouterr().err


def test_bench_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.csv"
    arguments = ["bench", "--preset", "smoke", "--device", "cpu", "--seconds", "0.01", "--output", str(path)]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    found = rows.read([path])
    assert {row.contender for row in found} == {contender.name for contender in eager()}
    assert len(found) == 2 * len(eager())
    for each in found:
        assert each.status == "ok", each
        assert each.both_ms > 0
        assert (each.error is None) == (each.exact is None)
        assert each.command == f"alrp-triton {' '.join(arguments)}"
        assert each.torch == torch.__version__
        assert each.contender in output
    assert f"{len(found)} rows appended" in output


def test_bench_options_are_the_suite_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: alrp-triton bench")
    assert "--preset" in output
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--nothing"])
    assert stopped.value.code == 2


def test_bench_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["bench", "--preset", "smoke"]) == 1
    assert "rich not found: pip install 'alrp-triton[bench]'" in capsys.readouterr().err


def test_other_commands_do_not_import_the_benchmarks() -> None:
    code = (
        "import sys; from alrp_triton import cli; assert cli.main(['info', '--json']) == 0;"
        "print(any(name.startswith('alrp_triton.benchmarks') for name in sys.modules), file=sys.stderr)"
    )
    done = start_python(code)
    assert done.returncode == 0
    assert done.stderr.split() == ["False"]


def test_runs_from_the_repository_root() -> None:
    code = "import runpy; runpy.run_module('benchmarks.suite', run_name='__main__', alter_sys=True)"
    done = start_python(code, "--preset", "smoke", "--list", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
