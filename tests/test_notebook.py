"""The notebook runs, its outputs are those of its source, and what its text says is what was printed."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")
plt = pytest.importorskip("matplotlib.pyplot")

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "tutorials" / "digits.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")


class Output(NamedTuple):
    printed: str
    num_pictures: int


def kept(cell) -> Output:
    printed = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
    return Output("".join(printed), len(cell["outputs"]) - len(printed))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs all cells beside a copy of the examples; returns their names, and the output of each cell."""
    (tmp_path / "docs" / "tutorials").mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path / "docs" / "tutorials")
    monkeypatch.syspath_prepend("")  # so that what the notebook adds to the path is taken away again
    plt.switch_backend("Agg")

    def run(quick):
        names, outputs = {}, []
        for cell in CODE:
            source = "".join(cell["source"])
            exec(compile(source.replace("QUICK = False", f"QUICK = {quick}"), PATH.name, "exec"), names)
            outputs.append(Output(capsys.readouterr().out, len(plt.get_fignums())))
            plt.close("all")
        return names, outputs

    return run


def check_text(printed: str) -> None:
    """What the text says, by what a whole run has printed."""

    def numbers(pattern: str) -> list[float]:
        return [float(number) for number in re.search(pattern, printed, re.MULTILINE).groups()]

    (ap,) = numbers(r"^all +(\S+)")
    assert ap == pytest.approx(0.6, abs=0.05)
    num_shown, highest = numbers(r"^(\d+) detections from 0.5 on; the highest score is (\S+)")
    assert num_shown == 0
    assert highest < 0.5
    num_detections, error = numbers(r"^before +(\d+) +(\S+)")
    num_shown, precision, recall = numbers(r"^ after +\d+ +\S+ +(\d+) +(\S+) +(\S+)")
    assert numbers(r"^ after +(\d+) +(\S+)")[0] == num_detections
    assert numbers(r"^ after +\d+ +(\S+)")[0] < error / 5
    assert num_shown > 300
    assert precision > 0.7
    assert recall > 0.5
    assert numbers(r"^AP (\S+) before")[0] == pytest.approx(numbers(r"^AP .* before, (\S+) after")[0], abs=2e-4)
    assert numbers(r"^0.5: LRP ([\d.]+)")[0] == pytest.approx(numbers(r"^own: LRP ([\d.]+)")[0], abs=0.03)
    same, scenes = numbers(r"^(\d+) of (\d+) scenes have the same detections")
    assert same == scenes == 200


def test_cells_run_and_their_outputs_are_kept(run):
    """What the cells print and draw is in the file, but for numbers, which need the whole training."""
    names, outputs = run(quick=True)
    for output, cell in zip(outputs, CODE, strict=True):
        now, then = (set(re.findall(r"[A-Za-z]{2,}", each.printed)) - {"nan"} for each in (output, kept(cell)))
        assert now == then
        assert output.num_pictures == kept(cell).num_pictures
    for before, after in zip(names["detections"], names["calibrated"], strict=True):
        assert torch.equal(before["boxes"], after["boxes"])  # in the same order
        torch.testing.assert_close(names["report"].calibration(before["scores"]), after["scores"], rtol=1e-3, atol=0)
    assert names["before"].ap == names["after"].ap
    assert len(names["same"]) == 20
    assert all(names["same"])
    assert all(len(stats) == 10 for stats in names["history"])


def test_the_file_has_the_outputs_of_one_run():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output.get("name", "picture") for output in outputs} == {"stdout", "picture"}  # no warnings, no errors
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    raw = PATH.read_text(encoding="utf-8")
    assert len(raw) < 400_000
    assert not re.search(r"(^|[\s\"'])(/\w+/|[A-Z]:\\)", "".join(kept(cell).printed for cell in CODE))
    check_text("".join(kept(cell).printed for cell in CODE))


def test_the_text_is_right():
    seconds = re.search(r"(\d+) s in all", kept(CODE[-1]).printed)[1]
    assert "about three minutes" in TEXT
    assert int(seconds) < 300
    experiments = (ROOT / "docs" / "design" / "experiments.md").read_text(encoding="utf-8")
    for name, ap in (("focal loss, L1", "34.5 ± 0.2"), ("AP Loss, L1", "53.2 ± 2.2")):
        assert f"| {name} | {ap} |" in experiments
        assert ap in TEXT
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXT)
    assert len(links) > 5
    for path, anchor in links:
        page = (PATH.parent / path).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in names, anchor


@pytest.mark.nightly
def test_the_text_holds_in_another_run(run):
    _, outputs = run(quick=False)
    check_text("".join(output.printed for output in outputs))
