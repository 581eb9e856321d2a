"""The command ``alrp-triton calibrate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from coco_scenes import found, scene, truth

from alrp_triton import cli
from alrp_triton.calibration import Calibration, expected_calibration_error, fit
from alrp_triton.metrics import evaluate

pytest.importorskip("pycocotools")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without rich."""
    monkeypatch.setitem(sys.modules, "rich", None)


def files(folder: Path, content: tuple[object, object]) -> list[str]:
    names = [folder / "truth.json", folder / "found.json"]
    for name, one in zip(names, content):
        name.write_text(json.dumps(one), encoding="utf-8")
    return list(map(str, names))


def rows(text: str) -> dict[str, list[str]]:
    """Words of the lines by their first word."""
    return {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words}


def test_numbers_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    boxes = [10.0, 10, 20, 20], [50.0, 50, 20, 20]
    data = truth(*boxes, [200.0, 200, 9, 9])
    detections = found((0.3, [10.0, 10, 20, 16]), (0.8, boxes[1]), (0.6, [90.0, 90, 9, 9]), (0.1, [70.0, 70, 9, 9]))
    assert cli.main(["calibrate", *files(tmp_path, (data, detections)), "--method", "isotonic"]) == 0
    # Best from 0.3 on: (0.2 / 0.5 + 1 + 1) / 4. Each score has a bin of its own; of the two from 0.5 on one is true.
    before = ["4", f"{(0.7 + 0.2 + 0.6 + 0.1) / 4:.4g}", "2", "0.5", "0.3333", "0.6", "0.3"]
    # The map is 0 at 0.1, 0.5 from 0.3 to 0.6 and 1 at 0.8, which is the precision in every bin.
    after = ["4", "0", "3", "0.6667", "0.6667", "0.6", "0.5"]
    output = capsys.readouterr().out
    assert rows(output)["before"] == before
    assert rows(output)["after"] == after
    assert output.splitlines()[0] == str(fit(data, detections, method="isotonic"))


@pytest.mark.parametrize("method", ["affine", "isotonic"])
def test_shows_and_writes_what_fit_returns(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    data, detections = scene(4, num_images=60)
    detections = [{**record, "score": record["score"] ** 4 / 20} for record in detections]
    names, written = files(tmp_path, (data, detections)), tmp_path / "map.json"
    options = ["--iou", "0.6", "--max-detections", "10", "--method", method, "--per-class", "--output", str(written)]
    assert cli.main(["calibrate", *names, *options]) == 0
    settings = {"iou": 0.6, "max_detections": 10}
    calibration = fit(data, detections, method=method, per_class=True, **settings)
    assert Calibration.from_dict(json.loads(written.read_text(encoding="utf-8"))) == calibration
    output = capsys.readouterr().out
    assert output.startswith(f"{calibration}\n")
    table, calibrated = rows(output), calibration.apply(detections)
    for name, scored in (("before", detections), ("after", calibrated)):
        assert table[name][1] == f"{expected_calibration_error(data, scored, **settings):.4g}"
    if method == "affine":
        for label, one in evaluate(data, detections, tau=0.6, max_detections=10).per_class.items():
            true, false, error, before, after = table[str(label)]
            assert int(true) + int(false) == one.num_detections
            if one.num_ground_truth:
                assert error == f"{one.olrp:.4g}"
                assert before == f"{one.olrp_threshold:.4g}"
                assert after == f"{calibration(one.olrp_threshold, label):.4g}"
            else:
                assert [true, error, before, after] == ["0", "-", "-", "-"]


def test_no_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", *files(tmp_path, (truth([0.0, 0, 5, 5]), []))]) == 0
    expected = ["0", "-", "0", "-", "0", "1", "-"]
    table = rows(capsys.readouterr().out)
    assert table["before"] == table["after"] == expected


@pytest.mark.parametrize(
    ("score", "more", "said"),
    [
        (1.5, [], "detections[0]['score']: expected a number in [0, 1], got 1.5"),
        (0.5, ["--iou", "1"], "iou: expected a number in (0, 1), got 1.0"),
        (0.5, ["--output", "/"], "Is a directory"),
    ],
)
def test_says_in_one_line_what_is_wrong(
    score: float, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = [0.0, 0, 5, 5]
    assert cli.main(["calibrate", *files(tmp_path, (truth(box), found((score, box)))), *more]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("alrp-triton calibrate: ")
    assert said in output.err
    assert output.err.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", "--help"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out
    for word in (
        "GT.json",
        "DT.json",
        "--iou",
        "--iou-type",
        "--max-detections",
        "--method",
        "--per-class",
        "--output",
    ):
        assert word in words
