"""What docs/mathematics.md states is what the code does: the worked example, places in the code, measured errors."""

import doctest
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import backends, evaluate

from alrp_triton.engine import operators
from alrp_triton.engine.knots import make_knots, ramp_coefficients
from alrp_triton.reference import difference, ramp

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
EXAMPLE = TEXT[TEXT.index("### 4.5") : TEXT.index("## 5.")]

POSITIVES, NEGATIVES = [0.0, 0.75], [-0.8, -0.2, 1.2]
LOGITS = torch.tensor(POSITIVES + NEGATIVES, dtype=torch.float64)
LABELS = torch.tensor([1, 1, 0, 0, 0])
LOC_ERRORS = torch.tensor([0.3, 0.6], dtype=torch.float64)
# The fixed point truncates each offset by up to 2^-36.
TOLERANCE = 1e-10


def blocks(kind: str) -> str:
    return "\n".join(re.findall(rf"^```{kind}\n(.*?)^```", EXAMPLE, re.MULTILINE | re.DOTALL))


def stated_tables() -> dict[str, list[Fraction]]:
    """The rows of the example's tables, by the symbol in their first cell."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", EXAMPLE, re.MULTILINE)]
    return {name: [Fraction(cell) for cell in cells] for name, *cells in rows if name not in ("", "---")}


def exact(expression: str) -> Fraction:
    """The value of an arithmetic expression, its decimals taken at their word."""
    assert re.fullmatch(r"[-+*/(). \d]+", expression), expression
    return eval(re.sub(r"\d+(\.\d+)?", r"Fraction('\g<0>')", expression), {"Fraction": Fraction})


def stated_sums() -> list[tuple[str, list[Fraction]]]:
    """Lines such as ``rank(1) = 1 + 2 = 3``: the name, and the value of each side."""
    lines = [line.split(" = ") for line in blocks("text").splitlines() if line]
    return [(name, [exact(side) for side in sides]) for name, *sides in lines]


def values_of_the_code(backend: str) -> dict[str, float]:
    """Every number that the example derives, by its name there."""
    smooth = evaluate(LOGITS, LABELS, LOC_ERRORS, backend, loc_ranking="smooth")
    ordered = evaluate(LOGITS, LABELS, LOC_ERRORS, backend, loc_ranking="sorted")
    excess = -2 * smooth.grad_logits[:2]
    above = ramp(difference(LOGITS[:2], LOGITS[:2]), 1.0)[[0, 1], [1, 0]]
    num_false_positives = smooth.rank - 1 - above
    vectors = {
        "N_FP": num_false_positives,
        "rank": smooth.rank,
        "c": excess,
        "w": excess / num_false_positives,
        "dp": smooth.grad_logits[:2],
        "dn": smooth.grad_logits[2:],
        "dE_smooth": smooth.grad_loc_errors,
        "dE_sorted": ordered.grad_loc_errors,
    }
    scalars = {
        "H(p_2 - p_1)": above[0],
        "H(p_1 - p_2)": above[1],
        "cls": smooth.cls,
        "loc_smooth": smooth.loc,
        "loc_sorted": ordered.loc,
        "dn(1) + dn(2) + dn(3)": smooth.grad_logits[2:].sum(),
        "-dp(1) - dp(2)": -smooth.grad_logits[:2].sum(),
    }
    numbered = {f"{name}({i})": float(v) for name, vector in vectors.items() for i, v in enumerate(vector, start=1)}
    return numbered | {name: float(value) for name, value in scalars.items()}


def test_the_sums_by_hand_add_up():
    for name, sides in stated_sums():
        assert len(sides) == 2, name
        assert sides[0] == sides[1], name


@pytest.mark.parametrize("backend", backends())
def test_the_sums_by_hand_are_what_the_code_gives(backend):
    expected = values_of_the_code(backend)
    assert {name for name, _ in stated_sums()} == set(expected)
    for name, sides in stated_sums():
        assert float(sides[-1]) == pytest.approx(expected[name], rel=0, abs=TOLERANCE), name


def test_the_tables_are_what_the_code_makes():
    positives = torch.tensor(POSITIVES, dtype=torch.float64)
    knots = make_knots(positives, 1.0)
    totals, unit = operators.count_negatives([LOGITS], [LABELS], knots.thresholds, positives, 1.0, -1, "torch")
    # Without bucket 0, and without the count of NaN; offsets are in units of 2 delta.
    counts, distances = totals[:, 1:-1].double() * torch.stack([torch.ones_like(unit), 2 * unit])[:, None]
    numbers = values_of_the_code("torch")
    weights = torch.tensor([numbers["w(1)"], numbers["w(2)"]], dtype=torch.float64)
    level, slope = ramp_coefficients(knots, weights / 2)[:, 1:]
    expected = {
        "$l_i$": knots.begin,
        "$e_i$": knots.end,
        r"$\kappa_b$": knots.thresholds,
        "$C_b$": counts,
        "$D_b$": distances,
        "$A_b$": counts.flip(0).cumsum(0).flip(0),
        "$B_b$": (distances + counts * knots.thresholds).flip(0).cumsum(0).flip(0),
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


def test_the_session_prints_what_it_shows():
    session = doctest.DocTestParser().get_doctest(blocks("pycon"), {}, "example", None, None)
    assert len(session.examples) >= 8
    assert doctest.DocTestRunner().run(session).failed == 0


def test_places_in_the_code_exist():
    places = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT)
    assert len(places) > 10
    for path, names in places:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^\s*((def|class) {name}\b|{name}(, \w+)* = )", source, re.MULTILINE), f"{path}: {name}"
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (ROOT / "docs" / path).is_file(), path


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "golden").glob("*.npz")), ids=lambda path: path.stem)
def test_measured_errors(path):
    golden = np.load(path)
    case = [torch.from_numpy(golden[key]) for key in ("logits", "targets", "loc_errors")]
    gradient = evaluate(*case, "torch").grad_logits.double()
    expected = evaluate(case[0].double(), *case[1:], "reference").grad_logits
    error = (gradient - expected).abs()
    assert (error <= 3 * 2.0**-24 * expected.abs()).all()
    assert error.norm() <= 4e-8 * expected.norm()


def test_figures_can_be_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    subprocess.run([sys.executable, ROOT / "docs" / "make_figures.py", "--output", tmp_path], check=True, cwd=ROOT)
    names = [path.name for path in tmp_path.iterdir()]
    assert names == ["piecewise.png"]
    for name in names:
        # Other versions of matplotlib move letters by a pixel; what the figure shows stays.
        drawn, committed = image.imread(tmp_path / name), image.imread(ROOT / "docs" / "images" / name)
        assert drawn.shape == committed.shape
        assert np.abs(drawn - committed).mean() < 0.03
