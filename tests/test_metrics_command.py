"""The command ``alrp-triton evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_scenes import found, scene, truth
from dialect.interpreters import start_python

from alrp_triton import cli
from alrp_triton.metrics import evaluate

pytest.importorskip("pycocotools")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    names = tmp_path / "truth.json", tmp_path / "found.json"
    for name, content in zip(names, scene(4)):
        name.write_text(json.dumps(content), encoding="utf-8")
    return str(names[0]), str(names[1])


def test_shows_what_evaluate_returns(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["evaluate", *files]) == 0
    assert capsys.readouterr().out == f"{evaluate(*files)}\n"
    settings = ["--tau", "0.7", "--max-detections", "3", "--score-threshold", "0.4"]
    written = tmp_path / "numbers.json"
    assert cli.main(["evaluate", *files, *settings, "--per-class", "--json", str(written)]) == 0
    metrics = evaluate(*files, tau=0.7, max_detections=3, score_threshold=0.4)
    assert capsys.readouterr().out == f"{metrics.table(per_class=True)}\n"
    assert json.loads(written.read_text(encoding="utf-8")) == json.loads(json.dumps(metrics.to_dict()))
    assert json.loads(written.read_text(encoding="utf-8"))["per_class"]["1"]["olrp"] == metrics.per_class[1].olrp


def test_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    data = truth([10, 10, 20, 20], segmentation=square)
    data["images"][0] |= {"width": 50, "height": 40}
    detections = [{**found((0.5, [0, 0, 1, 1]))[0], "segmentation": square}]
    for name, content in (("truth", data), ("found", detections)):
        (tmp_path / name).write_text(json.dumps(content))
    arguments = ["evaluate", str(tmp_path / "truth"), str(tmp_path / "found")]
    assert cli.main([*arguments, "--iou-type", "segm", "--json", str(tmp_path / "numbers")]) == 0
    assert json.loads((tmp_path / "numbers").read_text())["olrp"] == 0
    assert cli.main([*arguments, "--json", str(tmp_path / "numbers")]) == 0
    assert json.loads((tmp_path / "numbers").read_text())["olrp"] == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, [], "No such file or directory"),
        ("{", [], "detections: expected JSON, got"),
        ("3", [], "detections: expected a list of dicts, got int"),
        ('[{"image_id": 1}]', [], "detections[0]: expected the key 'category_id'"),
        ("[]", ["--tau", "1"], "tau: expected a number in (0, 1), got 1.0"),
        ("[]", ["--max-detections", "0"], "max_detections: expected at least 1, got 0"),
        ("[]", ["--score-threshold", "nan"], "score_threshold: expected a number, got NaN"),
        ("[]", ["--json", "{folder}"], "Is a directory"),
    ],
)
def test_says_in_one_line_what_is_wrong(
    content: str | None,
    more: list[str],
    said: str,
    files: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    detections = Path(files[1])
    detections.unlink()
    if content is not None:
        detections.write_text(content)
    more = [word.replace("{folder}", str(detections.parent)) for word in more]
    assert cli.main(["evaluate", *files, *more]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("alrp-triton evaluate: ")
    assert said in output.err
    assert output.err.count("\n") == 1


def test_without_pycocotools(files: tuple[str, str]) -> None:
    code = """
import sys
sys.modules["pycocotools"] = None
from alrp_triton.cli import main
sys.exit(main())
"""
    done = start_python(code, "evaluate", *files)
    assert done.returncode == 1
    assert done.stderr == "alrp-triton evaluate: pycocotools is not installed: pip install 'alrp-triton[metrics]'\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out
    for word in ("GT.json", "DT.json", "--iou-type", "--tau", "--max-detections", "--score-threshold", "--per-class"):
        assert word in words
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "only-one.json"])
    assert stopped.value.code == 2
