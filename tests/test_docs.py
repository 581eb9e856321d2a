"""What the documentation states is what the code does: worked examples, code blocks, places in the code, errors."""

import doctest
import inspect
import math
import re
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dialect import ALRP, by_backend, evaluate
from dialect.interpreters import start_python

from alrp_triton import (
    ALRPLoss,
    APLoss,
    NDCGLoss,
    RankSortLoss,
    alrp_loss,
    ap_loss,
    doctor,
    ndcg_loss,
    rank_sort_loss,
)
from alrp_triton.engine import Levels
from alrp_triton.engine.knots import make_knots, ramp_coefficients
from alrp_triton.engine.passes import passes_of
from alrp_triton.engine.sorting import sorting_sums
from alrp_triton.reference import difference, ramp

ROOT = Path(__file__).parent.parent
# What code blocks may need besides the package.
FRAMEWORKS = ("torchvision", "torchmetrics", "mmdet", "mmengine", "transformers", "detectron2", "ultralytics", "effdet")
FRAMEWORKS += ("monai", "libreyolo", "tensorboard", "lightning", "pycocotools", "rfdetr", "pytorch_lightning")
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PATHS = {path.name: path for path in TOP}
PATHS |= {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES = {page: path.read_text(encoding="utf-8") for page, path in PATHS.items()}
NEWCOMERS = {page for page in PAGES if page.startswith("tutorials/")} | {"index.md", "README.md"}
TEXT = PAGES["mathematics.md"]
EXAMPLE = TEXT[TEXT.index("### 4.5") : TEXT.index("## 5.")]
FAMILY = TEXT[TEXT.index("### 8.9") : TEXT.index("## 9.")]

POSITIVES, NEGATIVES = [0.0, 0.75], [-0.8, -0.2, 1.2]
LOGITS = torch.tensor(POSITIVES + NEGATIVES, dtype=torch.float64)
LABELS = torch.tensor([1, 1, 0, 0, 0])
LOC_ERRORS = torch.tensor([0.3, 0.6], dtype=torch.float64)
IOUS = 1 - LOC_ERRORS
# The fixed point truncates each offset by up to 2^-36.
TOLERANCE = 1e-10


def blocks(kind: str, text: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def sources() -> list[Path]:
    return [path for folder in ("alrp_triton", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def without_numbers(printed: str) -> list[str]:
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?|(?<!\S)-(?!\S)", "0", printed).split()


def stated_tables() -> dict[str, list[Fraction]]:
    """The rows of the example's tables, by the symbol in their first cell."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", EXAMPLE, re.MULTILINE)]
    return {name: [Fraction(cell) for cell in cells] for name, *cells in rows if name not in ("", "---")}


def computed(expression: str) -> Fraction | float:
    """The value of an arithmetic expression: exact, decimals being taken at their word, but for logarithms."""
    assert re.fullmatch(r"([-+*/(). \d]|log2)+", expression), expression
    numbers = re.sub(r"(?<!log)\d+(\.\d+)?", r"Fraction('\g<0>')", expression)
    return eval(numbers, {"Fraction": Fraction, "log2": math.log2})


class Stated(NamedTuple):
    """A line such as ``rank(1) = 1 + 2 = 3``, or ``w(1) = 2 / 3 ≈ 0.67``."""

    name: str
    derivation: Fraction | float
    result: Fraction | float
    rounding: float
    """The unit of the last decimal that is shown; 0 for exact results."""


def stated_sums(text: str) -> list[Stated]:
    sums = []
    for line in "".join(blocks("text", text)).splitlines():
        name, derivation, sign, result = re.fullmatch(r"(.+?) = (.+) ([=≈]) (.+)", line).groups()
        rounding = 10.0 ** -len(result.split(".")[1]) if sign == "≈" else 0
        sums.append(Stated(name, computed(derivation), computed(result), rounding))
    return sums


def values_of_the_code(backend: str) -> dict[str, float]:
    """Every number that the example derives, by its name there."""
    smooth = evaluate(ALRP, LOGITS, LABELS, LOC_ERRORS, backend, loc_ranking="smooth")
    ordered = evaluate(ALRP, LOGITS, LABELS, LOC_ERRORS, backend, loc_ranking="sorted")
    excess = -2 * smooth["cls by logits"][:2]
    above = ramp(difference(LOGITS[:2], LOGITS[:2]), 1.0)[[0, 1], [1, 0]]
    num_false_positives = smooth["rank"] - 1 - above
    vectors = {
        "N_FP": num_false_positives,
        "rank": smooth["rank"],
        "c": excess,
        "w": excess / num_false_positives,
        "dp": smooth["cls by logits"][:2],
        "dn": smooth["cls by logits"][2:],
        "dE_smooth": smooth["loc by values"],
        "dE_sorted": ordered["loc by values"],
    }
    scalars = {
        "H(p_2 - p_1)": above[0],
        "H(p_1 - p_2)": above[1],
        "cls": smooth["cls"],
        "loc_smooth": smooth["loc"],
        "loc_sorted": ordered["loc"],
        "dn(1) + dn(2) + dn(3)": smooth["cls by logits"][2:].sum(),
        "-dp(1) - dp(2)": -smooth["cls by logits"][:2].sum(),
    }
    return numbered(vectors) | {name: float(value) for name, value in scalars.items()}


def numbered(vectors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {f"{name}({i})": float(v) for name, vector in vectors.items() for i, v in enumerate(vector, start=1)}


def values_of_the_family(backend: str) -> dict[str, float]:
    """Every number that the example of the other members derives, by its name there, and some that it leaves out."""
    logits = LOGITS.clone().requires_grad_()
    settings = {"delta": 1.0, "backend": backend}
    ranking, sorting = rank_sort_loss(logits, LABELS, IOUS, **settings)
    losses = {
        "AP": ap_loss(logits, LABELS, interpolated=False, **settings),
        "step": ap_loss(logits, LABELS, interpolated=False, delta=0, backend=backend),
        "interpolated": ap_loss(logits, LABELS, delta=0, backend=backend),
        "ranking": ranking,
        "sorting": sorting,
        "NDCG": ndcg_loss(logits, LABELS, **settings),
    }
    assert ap_loss(logits, LABELS, **settings) == losses["AP"]
    sent = {name: torch.autograd.grad(loss, logits, retain_graph=True)[0] for name, loss in losses.items()}
    losses = {name: loss.detach() for name, loss in losses.items()}
    num_false_positives = torch.tensor([1.5, 0.75], dtype=torch.float64)
    gain = float(1 + 1 / torch.tensor(3.0, dtype=torch.float64).log2())
    rank, above, target_rank, target_above, missorted = sorting_sums(LOGITS[:2], IOUS, None, 1.0)
    vectors = {
        "precision": 1 + 2 * sent["AP"][:2],
        "precision_step": 1 + 2 * sent["step"][:2],
        "rank_RS": num_false_positives / (-2 * sent["ranking"][:2]),
        "a": above / rank,
        "a_target": target_above / target_rank,
        "m": missorted,
        "c_NDCG": -gain * sent["NDCG"][:2],
        "w_NDCG": -gain * sent["NDCG"][:2] / num_false_positives,
    }
    for name, gradient in sent.items():
        vectors |= {f"dp_{name}": gradient[:2], f"dn_{name}": gradient[2:]}
    scalars = {
        "AP": losses["AP"],
        "AP_step": losses["step"],
        "AP_interpolated": losses["interpolated"],
        "dn_AP(1) + dn_AP(2) + dn_AP(3)": sent["AP"][2:].sum(),
        "ranking": losses["ranking"],
        "sorting": losses["sorting"],
        "Z": gain,
        "NDCG": losses["NDCG"],
        "remains": losses["NDCG"] + sent["NDCG"][:2].sum(),
    }
    return numbered(vectors) | {name: float(value) for name, value in scalars.items()}


@pytest.mark.parametrize("text", [EXAMPLE, FAMILY], ids=["4.5", "8.9"])
def test_the_sums_by_hand_add_up(text):
    for stated in stated_sums(text):
        if stated.rounding:
            # Of rounded numbers, too.
            assert abs(stated.derivation - float(stated.result)) < stated.rounding, stated.name
        else:
            assert stated.derivation == stated.result, stated.name


@by_backend
@pytest.mark.parametrize(
    ("text", "values"), [(EXAMPLE, values_of_the_code), (FAMILY, values_of_the_family)], ids=["4.5", "8.9"]
)
def test_the_sums_by_hand_are_what_the_code_gives(text, values, backend):
    expected = values(backend)
    stated = stated_sums(text)
    assert {name for name, *_ in stated} <= set(expected)
    if text == EXAMPLE:
        assert {name for name, *_ in stated} == set(expected)
    for name, _, result, rounding in stated:
        tolerance = TOLERANCE + rounding / 2
        assert float(result) == pytest.approx(expected[name], rel=0, abs=tolerance), name


def test_the_tables_are_what_the_code_makes():
    positives = torch.tensor(POSITIVES, dtype=torch.float64)
    knots = make_knots(positives, 1.0)
    passes, levels = passes_of("torch"), Levels([LOGITS], [LABELS])
    totals, unit = torch.zeros(2, 2 * len(positives) + 2, dtype=torch.int64), 2.0**-36
    passes.count(levels, knots.table, passes.find(levels, 2, ""), totals, 1.0, levels.num_logits())
    # Without bucket 0, and without the count of NaN; offsets are in units of 2 delta.
    counts, distances = totals[:, 1:-1].double() * torch.tensor([1.0, 2 * unit])[:, None]
    thresholds = knots.table.thresholds[: 2 * len(positives)]
    numbers = values_of_the_code("torch")
    weights = torch.tensor([numbers["w(1)"], numbers["w(2)"]], dtype=torch.float64)
    level, slope = ramp_coefficients(knots, weights / 2)[:, 1:]
    expected = {
        "$l_i$": knots.begin,
        "$e_i$": knots.end,
        r"$\kappa_b$": thresholds,
        "$C_b$": counts,
        "$D_b$": distances,
        "$A_b$": counts.flip(0).cumsum(0).flip(0),
        "$B_b$": (distances + counts * thresholds).flip(0).cumsum(0).flip(0),
        r"$\alpha_b$": level,
        r"$\beta_b$": slope,
    }
    stated = stated_tables()
    assert set(stated) == set(expected)
    for name, values in expected.items():
        assert [float(cell) for cell in stated[name]] == pytest.approx(values.tolist(), rel=0, abs=TOLERANCE), name


def test_the_inputs_are_those_stated():
    for name, values in (("p", POSITIVES), ("E", LOC_ERRORS.tolist()), ("n", NEGATIVES)):
        stated = re.search(rf"\${name} = \(([^)]*)\)\$", EXAMPLE)
        assert stated is not None, name
        assert [float(number) for number in stated[1].split(",")] == values
    assert f"$t = ({', '.join(f'{t:.1f}' for t in IOUS.tolist())})$" in FAMILY


@pytest.mark.parametrize(
    "text",
    [EXAMPLE, FAMILY, PAGES["metrics.md"], PAGES["calibration.md"]],
    ids=["4.5", "8.9", "metrics", "calibration"],
)
def test_the_session_prints_what_it_shows(text):
    if text == PAGES["calibration.md"]:
        pytest.importorskip("pycocotools")
    session = doctest.DocTestParser().get_doctest("\n".join(blocks("pycon", text)), {}, "example", None, None)
    assert len(session.examples) >= 8
    assert doctest.DocTestRunner().run(session).failed == 0


@pytest.mark.parametrize("num_pos", [2, 10, 100, 1000])
def test_what_remains_of_ndcg_when_positives_are_alike(num_pos):
    stated = re.search(rf"([\d.]+) for \$P = {num_pos}\$", TEXT[TEXT.index("positives alike") :])
    logits = torch.cat([torch.zeros(num_pos), torch.full((5,), -9.0)]).double().requires_grad_()
    loss = ndcg_loss(logits, (torch.arange(num_pos + 5) < num_pos).long())
    assert float(stated[1]) == pytest.approx(loss.item(), rel=0, abs=0.005)
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_the_sums_of_lrp_add_up():
    rows = re.findall(r"^\| ([\d.]+) \| .* \| \(([^)]*)\) / (\d) = ([\d.]+)", PAGES["metrics.md"], re.MULTILINE)
    assert len(rows) == 5
    lowest = min(rows, key=lambda row: row[-1])
    assert f"({lowest[1]}) / {lowest[2]} = {lowest[3]}, the lowest" in PAGES["metrics.md"]
    for _, errors, total, result in rows:
        assert float(computed(f"({errors}) / {total}")) == pytest.approx(float(result), rel=0, abs=0.0005)


def test_ndcg_looks_at_the_place_and_ap_at_the_ratio():
    """The errors of a positive at rank 2 that belongs at 1, and at rank 1000 that belongs at 500."""
    costs = [float(number) for number in re.search(r"\$c_i\$ in NDCG are ([\d.]+) and\s([\d.]+)\.", TEXT).groups()]
    gains = [[1 / math.log2(1 + rank) for rank in ranks] for ranks in ((1, 2), (500, 1000))]
    assert costs == [round(target - gain, 3) for target, gain in gains]
    ratio = (gains[0][0] - gains[0][1]) / (gains[1][0] - gains[1][1])
    assert f"{ratio:.0f} times as wrong" in PAGES["losses.md"]


def test_places_in_the_code_exist():
    places = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT)
    assert len(places) > 10
    for path, names in places:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^\s*((def|class) {name}\b|{name}(, \w+)* = )", source, re.MULTILINE), f"{path}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = PATHS[page].parent
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PAGES[page]):
        assert (folder / path).exists(), path
        if anchor:
            target = folder / path if path else PATHS[page]
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub names them.
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
    for path in re.findall(r"`([\w/]+/[\w/]*\.py)`", PAGES[page]):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    """In order, each with the names of those before it; without those that load pretrained weights, or that name a
    framework that is not installed here, and without those that need names of these. Pages for newcomers show what
    blocks print, but for its numbers, which depend on the machine."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": Path(page).stem}
    torch.manual_seed(0)
    code, lacking = blocks("python", PAGES[page]), set()
    for block in code:
        matching = {"pycocotools"} if page in ("metrics.md", "calibration.md") else set()
        needed = {name for name in FRAMEWORKS if name in block} | matching
        absent = {name for name in needed if find_spec(name) is None}
        if "retinanet_resnet50_fpn(num_classes" in block:
            continue
        if absent:
            lacking |= absent
            continue
        try:
            exec(compile(block, page, "exec"), names)
        except NameError:
            if not lacking:
                raise
    if page in NEWCOMERS and not lacking:
        assert without_numbers(capsys.readouterr().out) == without_numbers("".join(blocks("text", PAGES[page])))
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()
    if lacking and all(any(name in block for name in lacking) for block in code):
        pytest.skip(f"all blocks need {', '.join(sorted(lacking))}")


def test_messages_that_are_headings_are_those_of_the_code():
    messages = re.findall(r"^### `([^`]+ [^`]+)`$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(messages) >= 7
    code = "".join(path.read_text(encoding="utf-8") for path in sources())
    for message in messages:
        assert message in code, message


def test_environment_variables_are_those_that_the_code_reads():
    code = "".join(path.read_text(encoding="utf-8") for path in sources())
    read = re.findall(r"""environ(?:\.\w+\(|\[)["'](\w+)""", code) + list(doctor._ENVIRONMENT)
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGES["environment.md"], re.MULTILINE)) == sorted(set(read))


def test_members_of_the_torchvision_integration_are_listed():
    integration = pytest.importorskip("alrp_triton.integrations.torchvision")
    table = re.findall(r"^\| `(use_\w+)\(model[^|]*\)` \| `(\w+(?:\(\))?)`", PAGES["losses.md"], re.MULTILINE)
    assert {name for name, _ in table} == {name for name in integration.__all__ if name.startswith("use_")}
    for name, criterion in table:
        assert criterion == "criterion" or criterion in inspect.getsource(getattr(integration, name))


def test_defaults_are_those_of_the_table():
    row = re.search(r"^\| hyperparameters \|(.*)\|$", PAGES["losses.md"], re.MULTILINE)[1].split("|")
    for cell, (function, module) in zip(
        row, [(alrp_loss, ALRPLoss), (ap_loss, APLoss), (rank_sort_loss, RankSortLoss), (ndcg_loss, NDCGLoss)]
    ):
        for name, value in re.findall(r"`(\w+)` = ([\d.]+)", cell):
            assert inspect.signature(module).parameters[name].default == float(value)
            assert name == "tau" or inspect.signature(function).parameters[name].default == float(value)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "golden").glob("*.npz")), ids=lambda path: path.stem)
def test_measured_errors(path):
    golden = np.load(path)
    case = [torch.from_numpy(golden[key]) for key in ("logits", "targets", "loc_errors")]
    gradient = evaluate(ALRP, *case, "torch")["cls by logits"].double()
    expected = evaluate(ALRP, case[0].double(), *case[1:], "reference")["cls by logits"]
    error = (gradient - expected).abs()
    assert (error <= 3 * 2.0**-24 * expected.abs()).all()
    assert error.norm() <= 4e-8 * expected.norm()


@pytest.mark.nightly
def test_figures_can_be_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = start_python(code, str(ROOT / "docs" / "make_figures.py"), "--output", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["members.png", "piecewise.png"]
    for name in names:
        # Other versions of matplotlib move letters by a pixel; what the figure shows stays.
        drawn, committed = image.imread(tmp_path / name), image.imread(ROOT / "docs" / "images" / name)
        assert drawn.shape == committed.shape
        assert np.abs(drawn - committed).mean() < 0.03
