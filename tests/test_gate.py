"""What the kernels cost, against the record of what they may cost; see benchmarks/gate.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from cases import KERNELS

pytest.importorskip("triton", minversion="3.3", reason="earlier releases compile through another interface")
if KERNELS:
    pytest.skip("kernels are not compiled in Triton's interpreter", allow_module_level=True)

import triton
from alrp_triton.kernels import buckets, configurations

from benchmarks import gate, static

VERSION, RECORD = gate.recorded()
of_this_compiler = pytest.mark.skipif(
    triton.__version__ != VERSION, reason=f"the record is of Triton {VERSION}, this is {triton.__version__}"
)


def test_every_pinned_configuration_is_recorded() -> None:
    assert set(RECORD) == set(gate.CONFIGURATIONS)
    compiled = {(c.kernel, c.variant) for c in RECORD}
    assert compiled == {(kernel, variant) for variant, kernels in static.VARIANTS.items() for kernel in kernels}
    for configuration, costs in RECORD.items():
        # ptxas may keep one number of a thread in memory to have more threads.
        assert costs["spill_bytes"] <= (8 if configuration.variant == "grouped levels" else 0)
        assert costs["registers"] > 0
        linear = configuration.kernel in ("buckets", "gradient")
        assert (costs["per_logit"] is not None) == linear
        assert (costs["per_pair"] is not None) == (
            not linear
            and configuration.kernel
            not in ("collect", "order", "positives", "table", "running_max", "combine", "interpolate", "own")
        )


@of_this_compiler
@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(configuration, id=" ".join(configuration), marks=pytest.mark.xdist_group(f"compiled for {target}"))
        for configuration in gate.CONFIGURATIONS
        for target in [configuration.target]
    ],
)
def test_nothing_costs_more_than_recorded(configuration: gate.Compiled) -> None:
    more = gate.worse(RECORD[configuration], configuration.figures())
    assert not more, "if this has to be: python -m benchmarks.gate --record, and say why"


@of_this_compiler
def test_a_worsened_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets in fixed point computed by way of float64, as one might who fears for digits."""
    source = Path(buckets.__file__).read_text(encoding="utf-8")
    slower = source.replace("(offset * scale)", "(offset.to(tl.float64) * scale)")
    assert slower != source
    path = tmp_path / "slower.py"
    path.write_text(slower.replace("from .", "from alrp_triton.kernels."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("slower", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(static.KERNELS, "buckets", module.bucket_kernel)
    monkeypatch.setattr(gate, "CONFIGURATIONS", [gate.Compiled("sm_90", "buckets", "", "float32")])
    with pytest.raises(SystemExit) as ended:
        gate.main([])
    assert ended.value.code == 1
    assert "per_logit" in capsys.readouterr().out


@of_this_compiler
def test_a_worsened_setting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configurations.PINNED, "gradient", {"default": {"block": 4096, "num_warps": 4}})
    configuration = gate.Compiled("sm_90", "gradient", "", "float32")
    assert any(cost.startswith("registers") for cost in gate.worse(RECORD[configuration], configuration.figures()))


@of_this_compiler
def test_recording_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gate, "CONFIGURATIONS", [gate.Compiled("sm_80", "positives", "", "float32")])
    path = tmp_path / "new" / "static.json"
    gate.main(["--record", "--file", str(path)])
    gate.main(["--file", str(path)])
    assert "1 configurations, none worse" in capsys.readouterr().out
    content = json.loads(path.read_text(encoding="utf-8"))
    content["configurations"][0]["instructions"] -= 1
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        gate.main(["--file", str(path)])
    assert "instructions" in capsys.readouterr().out
    path.write_text(json.dumps(content | {"triton": "0.0"}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"record is of Triton 0\.0"):
        gate.main(["--file", str(path)])
