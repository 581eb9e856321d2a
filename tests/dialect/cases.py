"""The hard inputs, made once for all tests: by seed, small, and each with a name."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

# Of all tests that draw cases: how long one takes says nothing where other processes share the machine.
settings.register_profile("unhurried", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
repeatable = partial(settings, derandomize=True)
"""Settings of tests that draw the same cases in every run."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter."""
BORROWED = os.environ.get("VIRTUAL_GPU") == "borrowed"
"""Whether kernels run on a GPU of this machine, to which each launch copies its tensors (``borrowed_gpu``)."""


def _compiled_for() -> int:
    major, minor = torch.cuda.get_device_capability() if BORROWED else (0, int(os.environ.get("VIRTUAL_GPU", "0")))
    return 10 * major + minor


COMPILED_FOR = _compiled_for()
"""The target that kernels are compiled for, to run on the virtual GPU of tests/virtual_gpu, such as 90; or 0."""
KERNELS = INTERPRETED or COMPILED_FOR > 0
"""Whether kernels run at all, either way about a thousand times slower than this process runs the rest."""
assert not (INTERPRETED and COMPILED_FOR), "TRITON_INTERPRET or VIRTUAL_GPU, not both"

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
FLOAT_MAX = torch.finfo(torch.float32).max
INF, NAN = float("inf"), float("nan")


class Case(NamedTuple):
    """One flat problem with a label for each logit: 1 positive, 0 negative, -1 ignored."""

    name: str
    logits: Tensor
    labels: Tensor
    loc_errors: Tensor

    @property
    def num_positives(self) -> int:
        return len(self.loc_errors)


# Mean and standard deviation of the negatives' and of the positives' scores.
REGIMES = {
    "early": ((-4.6, 0.05), (-4.6, 0.05)),
    "middle": ((-4.0, 1.0), (-2.5, 1.0)),
    "late": ((-8.0, 1.5), (3.0, 1.5)),
    "inverted": ((2.0, 2.0), (-4.0, 2.0)),
}


def random_labels(num_logits: int, num_pos: int, ignored: float, generator: torch.Generator) -> Tensor:
    """``num_pos`` positives at random places, and that share of the rest ignored (rounded down)."""
    labels = torch.zeros(num_logits, dtype=torch.int64)
    places = torch.randperm(num_logits, generator=generator)
    labels[places[:num_pos]] = 1
    labels[places[num_pos : num_pos + int(ignored * (num_logits - num_pos))]] = -1
    return labels


def listed_case(name: str, positives: list[float], negatives: list[float], dtype: torch.dtype = torch.float32) -> Case:
    """The positives' scores, then the negatives', with errors from 0.1 to 0.9."""
    logits = torch.tensor(positives + negatives, dtype=dtype)
    labels = torch.tensor([1] * len(positives) + [0] * len(negatives))
    return Case(name, logits, labels, torch.linspace(0.1, 0.9, len(positives)))


def random_case(
    num_logits: int,
    num_pos: int,
    regime: str = "middle",
    *,
    name: str | None = None,
    seed: int = 0,
    ignored: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Normally distributed scores as they are at some time of a training."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(num_logits, num_pos, ignored, generator)
    (neg_mean, neg_std), (pos_mean, pos_std) = REGIMES[regime]
    noise = torch.randn(num_logits, generator=generator, dtype=torch.float64)
    logits = torch.where(labels == 1, pos_mean + pos_std * noise, neg_mean + neg_std * noise).to(dtype)
    errors = torch.rand(num_pos, generator=generator)
    return Case(name or f"{regime}-{num_logits}-{num_pos}", logits, labels, errors)


def drawn_case(
    name: str, scores: list[float], num_logits: int, num_pos: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    """Every score drawn from a short list, for positives and negatives alike; a tenth ignored."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(scores), (num_logits,), generator=generator)
    logits = torch.tensor(scores, dtype=dtype)[choice]
    labels = random_labels(num_logits, num_pos, 0.1, generator)
    return Case(name, logits, labels, torch.rand(num_pos, generator=generator))


def _ties() -> list[Case]:
    return [
        drawn_case("integers", [float(k) for k in range(-3, 4)], 500, 40),
        drawn_case("halves", [0.5 * k for k in range(-6, 7)], 400, 60),
        drawn_case("two_values", [-0.25, 0.25], 300, 30),
        drawn_case("all_equal", [-4.6], 300, 17),
        drawn_case("all_zero", [0.0, -0.0], 129, 5),
    ]


def _counts() -> list[Case]:
    empty = torch.empty(0)
    return [
        random_case(200, 0, name="no_positives"),
        random_case(200, 1, name="one_positive"),
        random_case(150, 150, name="no_negatives"),
        random_case(150, 149, name="one_negative", ignored=0),
        random_case(2, 1, name="one_of_each", ignored=0),
        random_case(1, 1, name="a_positive"),
        random_case(1, 0, name="a_negative"),
        Case("nothing", empty, empty.long(), empty),
        Case("all_ignored", torch.randn(50), torch.full((50,), -1), empty),
        random_case(220, 200, name="more_positives_than_negatives", ignored=0),
        random_case(500, 30, name="mostly_ignored", ignored=0.9),
    ]


def _edges() -> list[Case]:
    sizes = [127, 128, 129, 1023, 1024, 1025]
    large = [] if KERNELS else [65535, 65536, 65537]
    crowds = [63, 64, 65, 127, 128, 129] + ([] if KERNELS else [511, 513, 1025])
    return [
        *(random_case(size, 3, "early", seed=size) for size in sizes),
        *(random_case(size, 3, "middle", seed=size) for size in large),
        *(random_case(num_pos + 150, num_pos, "middle", seed=num_pos) for num_pos in crowds),
    ]


def _magnitudes() -> list[Case]:
    generator = torch.Generator().manual_seed(7)
    case = random_case(400, 40, name="any_magnitude")
    signs = torch.randint(0, 2, (400,), generator=generator) * 2 - 1
    powers = torch.rand(400, generator=generator, dtype=torch.float64) * 83 - 44.5
    anywhere = (signs * 10**powers).float()
    return [
        # float32 is spaced by 64 at 1e9, by 1 and 2 around 2^24.
        drawn_case("about_1e9", [1e9 + 64 * k for k in range(8)], 300, 30),
        drawn_case("about_2_to_24", [2.0**24 + k for k in range(-8, 12)], 300, 30),
        drawn_case("about_minus_2_to_24", [-(2.0**24) + k for k in range(-8, 12)], 300, 30),
        drawn_case("far_apart", [-1e30, -1e9, -1.0, 0.0, 0.5, 1.0, 1e9, 1e30], 300, 30),
        drawn_case("float_max", [-FLOAT_MAX, -3e38, -1e38, 0.0, 1e38, 3e38, FLOAT_MAX], 300, 30),
        drawn_case("only_float_max", [-FLOAT_MAX, FLOAT_MAX], 100, 10),
        # Differences between scores that are no float32 numbers any more.
        listed_case("beyond_float_max", [-3e38, -2e38], [3e38, 0.0, -FLOAT_MAX]),
        listed_case("beyond_float_max_below", [3e38], [1e38, 3.2e38, -3e38]),
        drawn_case("subnormal", [k * 2.0**-149 for k in range(-9, 10)], 300, 30),
        drawn_case("tiny", [0.0, 1e-45, 1e-38, -1e-38, 1e-30, 1e-20, -1e-20, 1e-7], 300, 30),
        case._replace(logits=anywhere),
    ]


def _infinities() -> list[Case]:
    return [
        drawn_case("infinite", [-INF, -2.0, -1.0, 0.0, 0.5, INF], 300, 30),
        drawn_case("infinite_and_float_max", [-INF, -FLOAT_MAX, -1.0, 0.0, FLOAT_MAX, INF], 300, 30),
        drawn_case("only_infinite", [-INF, INF], 100, 10),
        drawn_case("all_plus_infinity", [INF], 100, 10),
        drawn_case("all_minus_infinity", [-INF], 100, 10),
        listed_case("positive_at_plus_infinity", [INF, 0.0], [INF, FLOAT_MAX, 0.5, -1.0]),
        listed_case("positive_at_minus_infinity_alone", [-INF], [FLOAT_MAX, 0.0, INF]),
        listed_case("positive_at_minus_infinity", [-INF, 0.0], [-INF, -FLOAT_MAX, 0.5, -1.0]),
        listed_case("positives_at_both_ends", [-INF, INF, INF, 0.0, -INF], [-INF, INF, 0.0, 0.25, FLOAT_MAX]),
        listed_case("negatives_at_both_ends", [0.0, 0.5, -FLOAT_MAX, FLOAT_MAX], [-INF, INF, INF, -INF, 0.25]),
    ]


def _dtypes() -> list[Case]:
    double_max = torch.finfo(torch.float64).max
    return [
        random_case(500, 40, "middle", name="float16", dtype=torch.float16),
        random_case(500, 40, "early", name="bfloat16", dtype=torch.bfloat16),
        random_case(500, 40, "late", name="bfloat16_late", dtype=torch.bfloat16),
        drawn_case("float16_ends", [-INF, -65504.0, -1.0, 0.0, 2.0**-24, 65504.0, INF], 200, 20, dtype=torch.float16),
        random_case(500, 40, "middle", name="float64", dtype=torch.float64),
        drawn_case("float64_fine", [1.0 + k * 2.0**-52 for k in range(5)], 200, 20, dtype=torch.float64),
        # Spaced by 2^-23 and by 1/8: near the smaller deltas.
        drawn_case("float64_1e9", [1e9 + k * 2.0**-23 for k in range(-9, 10)], 200, 20, dtype=torch.float64),
        drawn_case("float64_1e15", [1e15 + k / 8 for k in range(-9, 10)], 200, 20, dtype=torch.float64),
        drawn_case("float64_1e300", [-1e300, -1.0, 0.0, 1.0, 1e300], 200, 20, dtype=torch.float64),
        listed_case("float64_beyond_max", [-double_max, 0.0], [double_max, 0.25, -1.0], torch.float64),
        drawn_case("float64_max", [-double_max, -1.0, 0.0, 1.0, double_max, INF], 200, 20, dtype=torch.float64),
    ]


def _errors() -> list[Case]:
    case = random_case(500, 50, "middle", seed=3)
    poisoned = case.logits.masked_fill(case.labels == -1, NAN)
    return [
        case._replace(name="errors_above_1", loc_errors=4 * case.loc_errors),
        case._replace(name="errors_0", loc_errors=torch.zeros(50)),
        case._replace(name="errors_float64", loc_errors=case.loc_errors.double() / 3),
        case._replace(name="errors_bfloat16", loc_errors=case.loc_errors.bfloat16()),
        case._replace(name="ignored_nan", logits=poisoned),
    ]


def all_cases() -> list[Case]:
    """Every named case; the names are distinct."""
    size = 300 if KERNELS else 2003
    cases = [
        *(random_case(size, 37, regime, name=regime) for regime in REGIMES),
        *_ties(),
        *_counts(),
        *_edges(),
        *_magnitudes(),
        *_infinities(),
        *_dtypes(),
        *_errors(),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def load_golden(path: Path) -> tuple[Case, dict[str, Tensor]]:
    """A golden vector as a case, and all its arrays by key, in the dtypes they have in the file."""
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    return Case(path.stem, arrays["logits"], arrays["targets"], arrays["loc_errors"]), arrays


@st.composite
def problems(draw: st.DrawFn, scores: st.SearchStrategy[float] | None = None, max_size: int = 24) -> Case:
    """A small case for hypothesis; by default scores with many ties, differences at ramp ends, and infinities."""
    if scores is None:
        scores = st.one_of(
            st.integers(-8, 8).map(lambda k: k / 4),
            st.floats(-6, 6, width=32),
            st.sampled_from([-INF, INF, FLOAT_MAX, -FLOAT_MAX, 1e9, 2.0**-149]),
        )
    logits = draw(st.lists(scores, max_size=max_size))
    labels = draw(st.lists(st.sampled_from([1, 1, 0, 0, 0, -1]), min_size=len(logits), max_size=len(logits)))
    num_pos = labels.count(1)
    errors = draw(st.lists(st.floats(0, 2, width=32), min_size=num_pos, max_size=num_pos))
    return Case(
        "drawn",
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(errors, dtype=torch.float32),
    )
