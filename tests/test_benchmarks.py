"""The benchmarks time nothing that is wrong, resume where they stopped, and docs show what the results say."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from alrp_triton.benchmarks import gate, layers, model, peers, report, rows, run, step_share, tables
from alrp_triton.benchmarks.accuracy import LARGEST_ERROR, Judge, reduced
from alrp_triton.benchmarks.claims import claims
from alrp_triton.benchmarks.measure import Setting, measure
from alrp_triton.benchmarks.peers import BUCKETED, COMPILED, FOCAL, Contender, contenders, ours
from alrp_triton.benchmarks.presets import LARGE, ON_CPU, PRESETS
from alrp_triton.benchmarks.workloads import LAYOUTS, REGIMES, Case, Inputs, make_inputs
from dialect import KERNELS
from torch import Tensor

from alrp_triton import cli

pytestmark = pytest.mark.skipif(KERNELS, reason="measures the CPU")
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = Case("atss", image=32, batch=2, num_positives=12)
MACHINE = {"command": "", "device": "a CPU", "kind": "cpu", "threads": 1, "alrp_triton": "0", "commit": None}
MACHINE |= {"torch": "2", "triton": None, "python": "3"}
SETTING = Setting(CPU, MACHINE, bandwidth=1e10, seconds=60.0, repeats=3)


def right(inputs: Inputs) -> Tensor:
    return contenders(CPU)["vectorised"].loss(inputs)


def scaled(inputs: Inputs, factor: float = 1.00001) -> Tensor:
    return factor * right(inputs)


def overflowing(inputs: Inputs) -> Tensor:
    """Wrong on large inputs alone, as by an index that overflows."""
    value = right(inputs)
    return value if inputs.case.logits < 1000 else value + inputs.levels[0].flatten()[:10].sum() * 1e-3


def broken(inputs: Inputs) -> Tensor:
    raise RuntimeError("no kernel\nand more")


def one(contender: Contender, case: Case = SMALL, **changes) -> rows.Row:
    (row,) = measure(case, [contender], SETTING._replace(**changes))
    return row


def test_only_right_gradients_are_timed() -> None:
    row = one(Contender("right", right))
    assert (row.status, row.repeats) == ("ok", 3)
    assert row.both_ms > row.forward_ms > 0
    assert row.error < LARGEST_ERROR
    assert row.bandwidth_share == pytest.approx(row.floor_bytes / (row.both_ms / 1e3) / 1e10)
    half, large = SMALL._replace(dtype="bfloat16"), Case("proposals", image=64, batch=2, num_positives=10)
    assert one(Contender("right", right), half).status == "ok"
    for wrong, case in ((scaled, SMALL), (partial(scaled, factor=1.01), half), (overflowing, large)):
        row = one(Contender("wrong", wrong), case, reference_pairs=1000)
        assert (row.status, row.both_ms) == ("refused", None)
    assert row.error < LARGEST_ERROR  # on the small case, which the reference is given
    assert "differ" in row.note
    for of in ("aLRP", None):
        row = one(Contender("nan", lambda inputs: right(inputs) * math.nan, of, approximate=True))
        assert (row.status, row.both_ms) == ("refused", None)
    row = one(Contender("close", scaled, approximate=True))
    assert (row.status, row.exact, row.error) == ("ok", False, pytest.approx(1e-5, rel=0.1))
    broke, other = measure(SMALL, [Contender("broken", broken), Contender("right", right)], SETTING)
    assert (broke.status, broke.note, other.status) == ("failed", "RuntimeError: no kernel", "ok")
    assert one(Contender("right", right), SMALL._replace(num_positives=10**6)).status == "skipped"
    assert one(Contender("slow", right, largest_work=(1.0, 1.0))).status == "skipped"


@pytest.mark.parametrize("regime", REGIMES)
def test_contenders_are_what_they_claim(regime: str) -> None:
    for dtype, layout in (("float32", "flat"), ("bfloat16", "levels"), ("float16", "levels-last")):
        judge = Judge(Case("retinanet", regime, 32, 2, num_positives=20, dtype=dtype, layout=layout), CPU)
        for contender in contenders(CPU).values():
            if contender.name not in COMPILED and (layout == "flat" or contender.name != peers.CALLS):
                error = judge.error(contender)
                if contender.exact:
                    assert error <= LARGEST_ERROR, contender.name
                else:
                    assert error is None if contender.of is None else error > 10 * LARGEST_ERROR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_those_of_the_case(layout: str) -> None:
    case = Case("atss", "late", image=100, batch=2, num_positives=17, dtype="bfloat16", layout=layout)
    inputs = make_inputs(case)
    flat, labels = inputs.flat().detach(), inputs.logit_labels
    assert flat.shape == labels.shape == (case.logits,)
    assert labels.view(-1, 80).sum(1).max() == 1
    assert labels.sum() == 17 == len(inputs.pred_boxes)
    assert flat[labels == 1].double().mean() > 0 > -5 > flat.double().mean()
    assert layout != "levels" or all(level.permute(0, 3, 4, 1, 2).is_contiguous() for level in inputs.levels)


def test_a_timed_criterion_trains_as_the_plain_one() -> None:
    pytest.importorskip("torchvision")
    from detectors import BUILDERS, batch_for

    from alrp_triton import ALRPLoss
    from alrp_triton.integrations.torchvision import use_loss

    for name, builder in BUILDERS.items():
        plain, batch = builder(), batch_for(name)
        options = {"rpn_criterion": ALRPLoss(tau=0.7, self_balance=None)} if name == "faster_rcnn" else {}
        losses = use_loss(plain, ALRPLoss(self_balance=None), **options)(*batch)
        torch.stack(list(losses.values())).sum().backward()
        found = {}
        for contender in (ours("torch"), peers.LOOP):
            model = builder()
            found[contender] = step_share.step(contender, model, batch)
            assert 0 < found[contender].loss < found[contender].whole
            for mine, theirs in zip(model.parameters(), plain.parameters()):
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
        assert 0 < step_share.gradient_error(found[ours("torch")], found[peers.LOOP]) < 1e-6


def test_bench_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = {name: Contender(name, right) for name in (ours("torch"), "vectorised")}
    monkeypatch.setattr(run, "contenders", lambda device: known)
    path, case = tmp_path / "out.csv", ["--head", "atss", "--image", "32", "--batch", "2", "--positives", "12"]
    arguments = ["bench", *case, "--device", "cpu", "--seconds", "0.01", "--output", str(path), "--regime", "late"]

    def lines(*further: str) -> int:
        assert cli.main([*arguments, *further]) == 0
        return len(path.read_text().splitlines())

    assert lines() == 3
    assert lines("--resume") == 3
    assert "0 rows appended" in capsys.readouterr().out
    assert lines("middle", "--resume") == 5
    rows.append(path, dataclasses.replace(rows.read([path])[0], status="failed"))
    assert lines("--resume") == 7
    path.write_text(path.read_text().replace(torch.__version__, "1.0") + "2026-01-01,killed while writ")
    assert lines("--resume") == 10
    known[ours("torch")] = Contender(ours("torch"), scaled)
    assert cli.main(arguments) == 1
    assert "REFUSED: ours, torch: the gradient is off" in capsys.readouterr().out
    path.write_text("a,b\n1,2\n")
    assert cli.main(arguments) == 1
    assert "other columns" in capsys.readouterr().err


def test_documents_show_what_the_results_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check", "--root", str(ROOT)]) == 0, "python -m benchmarks.report rewrites the tables"
    (tmp_path / "docs" / "design").mkdir(parents=True)
    for page in tables.TABLES:
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "docs" / "design" / "performance.md"
    path.write_text(path.read_text(encoding="utf-8").replace("500 | late |", "500 | later |"), encoding="utf-8")
    assert report.main(["--check", "--root", str(tmp_path), *map(str, (ROOT / "benchmarks").rglob("suite-*.csv"))]) == 1
    assert (
        report.replaced("a <!-- x:begin -->\nold\n<!-- x:end --> b", "x", "new")
        == "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    )
    with pytest.raises(ValueError, match="each once"):
        report.replaced("<!-- x:end --><!-- x:begin -->", "x", "new")


def row(case: Case, contender: str, both_ms: float, **columns) -> rows.Row:
    machine = {**MACHINE, "date": "2026-01-01", "status": "ok", "exact": True}
    return rows.Row(**{**machine, **rows.describe(case), "contender": contender, "both_ms": both_ms, **columns})


def test_ratios_and_claims_by_hand() -> None:
    found = []
    for regime, factor in zip(REGIMES, (2, 4, 8)):
        on_cpu, on_gpu = ON_CPU._replace(regime=regime), LARGE._replace(regime=regime)
        found += [row(on_cpu, name, ms) for name, ms in ((ours("torch"), 50), (BUCKETED, 50 * factor), (FOCAL, 40))]
        found += [row(on_cpu, peers.OURS_BOXES, 44 + factor), row(on_cpu, "ours, NDCG", 25)]
        gpu = {"kind": "cuda", "device": "H100", "graph_ms": 0.2, "floor_ratio": 1.4 + factor / 10}
        found += [row(on_gpu, ours("triton"), 0.3, **gpu), row(on_gpu, peers.LOOP, 600, **{**gpu, "graph_ms": None})]
    by_name = {name: (value, how, target) for name, value, how, target in claims(found)}
    assert by_name[f"{ON_CPU.name}: bucketed by means / ours, torch"] == (4, ">=", 5)
    assert by_name[f"{ON_CPU.name}: ours + GIoU / focal + GIoU"] == (48 / 40, "<=", 1.5)
    assert by_name[f"{LARGE.name}: floor ratio"] == (pytest.approx(1.8), "<=", 2)
    assert by_name[f"{LARGE.name}: published loop / ours, triton"] == (2000, ">=", 1000)
    shown = tables.costs(found)
    assert "| atss" not in shown
    assert "| retinanet, float32, 31.4 M, 1,000 | late | 0.200 | 2,000 |" in shown, shown
    assert "| NDCG | 0.500 | 0.500 | 0.500 |" in tables.family(found[:4] + [r for r in found if r.kind == "cpu"])


def test_presets_fit_and_commands_of_documents_parse() -> None:
    pages = [ROOT / name for name in ("README.md", "Makefile", "CHANGELOG.md")]
    pages += [page for page in (ROOT / "docs").rglob("*.md") if page.name != "cli.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"(?:-m (benchmarks\.[\w.]+)|(alrp-triton bench\b))([^`#|\n]*)", text)
    assert len(found) > 15
    for case in (case for preset in PRESETS.values() for cases in preset.parts.values() for case in cases):
        assert 1 <= case.positives <= case.rows
        assert 1 <= reduced(case, 3e7).positives <= reduced(case, 3e7).rows
    parsers = {"report": report.parse, "gate": gate.parse, "model": model.parse, "layers": layers.parse}
    for module, bench, options in found:
        name = "run" if bench else module.removeprefix("benchmarks.")
        arguments = shlex.split(re.sub(r"\$\$?\w+", "smoke", options).partition(";")[0])
        if name == "run":
            run.plan(run.parse([*arguments, "--device", "cpu"], name))
        elif name in parsers:
            parsers[name](arguments)
        else:
            assert name.startswith(("training", "digits")) or not arguments
            assert importlib.util.find_spec(f"benchmarks.{name}") is not None, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert run.main(["--preset", "smoke", "--device", "cuda", "--output", str(path)]) == 0
    for mine in (found for found in rows.read([path]) if found.contender == ours("triton")):
        assert mine.graph_ms is not None, mine.graph_note
        assert 0 < mine.launches < 100
        assert mine.peak_mb > mine.beyond_gradient_mb > 0
        assert mine.wall_ms > 0
