"""What the benchmark suite writes: rows, claims, the table of README.md, pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from alrp_triton.benchmarks import presets, rows, selection, table
from alrp_triton.benchmarks.workloads import REGIMES
from benchmarking import measured, row

ROOT = Path(__file__).resolve().parent.parent


def test_rows_return_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    full = row(contender='with "quotes", comma', note="a\nb", error=1.25e-7, exact=False, launches=5)
    for each in (full, row(exact=None, status="failed", both_ms=None)):
        rows.append(path, each)
    assert rows.read([path]) == [full, row(exact=None, status="failed", both_ms=None)]
    rows.append(path, row(both_ms=3.0))
    assert [each.both_ms for each in rows.read([path])] == [10.0, 3.0]  # the last of a key
    with path.open("a") as file:
        file.write("2026-01-01,killed while writ")
    assert len(rows.read([path])) == 2
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append(path, full)
    with pytest.raises(ValueError, match="other columns"):
        rows.read([path])


def test_claims() -> None:
    found = {claim["claim"]: claim for claim in presets.claims(measured())}
    assert found["byte floors, float32, late (graph)"]["target"] == "<= 1.5"
    assert found["byte floors, float32, early (graph)"]["target"] == "<= 2.5"
    assert all(found[f"byte floors, bfloat16, {regime} (graph)"]["measured"] == 1.4 for regime in REGIMES)
    assert found["focal / ours, both + GIoU, eager, late"]["measured"] == 6
    assert found["loop (scaled from some positives) / ours, early"]["measured"] == 2000
    assert found["launches, small input, without the caller's two"]["measured"] == 8
    assert not found["ms, small input (graph)"]["met"]
    assert found["ours / focal, both + GIoU, eager, slowest regime"]["measured"] == 1.25
    assert found["bucketed by means / ours, middle"]["measured"] == 6
    assert len(found) == 6 * 2 + 3 * 3 + 2 + 1 + 3
    assert presets.claims([row()]) == []


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    for each in measured():
        rows.append(path, each)
    readme.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    arguments = [str(path), "--readme", str(readme)]
    assert table.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks:begin -->\n")
    assert text.endswith("\n<!-- benchmarks:end -->\nafter\n")
    assert "old" not in text
    assert "| retinanet, float32, 31.4 M, 1,000 | late | 0.200 | 50 % | 2,000 |" in text, text
    assert "(1e-02)" in text
    # A column stands where anything is in it; of a CPU there are no times.
    headers = [line for line in text.splitlines() if line.startswith("| head")]
    assert ["ours, ms" in header for header in headers] == [True, False]
    assert not any("| numba" in header for header in headers)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {header.count("|") for header in headers}
    rows.append(path, dataclasses.replace(measured()[0], both_ms=1000.0, graph_ms=None))
    assert table.main([*arguments, "--check"]) == 1
    assert "differs" in capsys.readouterr().err
    readme.write_text("no markers")
    assert table.main(arguments) == 1
    assert "benchmarks:begin" in capsys.readouterr().err


def test_readme_has_the_table_of_the_results() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("suite-*.csv"))
    assert results
    assert table.main([*map(str, results), "--readme", str(ROOT / "README.md"), "--check"]) == 0


def test_times_of_a_cpu_are_drawn_as_ratios() -> None:
    pytest.importorskip("matplotlib")
    from alrp_triton.benchmarks import plots

    devices = selection.by_device(measured())
    line = selection.along(devices["some CPU"], "logits")
    unit, name = plots._unit(line, "logits")
    first = min((row for row in line if row.contender == "ours, torch"), key=lambda row: row.logits)
    assert unit == first.both_ms
    assert name == f"in times of ours, torch at {first.logits:,}"
    assert plots._unit(next(iter(devices.values())), "logits")[1] == "ms"


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from alrp_triton.benchmarks import plots

    path = tmp_path / "rows.csv"
    rows.append(path, row())
    assert plots.main([str(path), "--output", str(tmp_path / "images")]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    for each in measured():
        rows.append(path, each)
    assert plots.main([str(path), "--output", str(tmp_path / "images")]) == 0
    written = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in written] == ["bench-bandwidth.png", "bench-logits.png", "bench-positives.png"]
    for file in written:
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_rows_for_a_picture() -> None:
    on_cpu = selection.by_device(measured())["some CPU"]
    line = selection.along(on_cpu, "logits")
    assert len({row.logits for row in line}) == 2
    assert {row.positives for row in line} == {500}
    assert len({row.regime for row in line}) == 1
    assert {row.logits for row in selection.along(on_cpu, "positives")} == {presets.ON_CPU.logits}
    assert len(selection.regimes(on_cpu)) == 3
    assert selection.regimes(on_cpu)[0][0].logits == presets.ON_CPU.logits
