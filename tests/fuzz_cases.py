"""Hostile problems, drawn from a seed and an index: shapes, dtypes, strides, labels, groups and numbers of every kind.

What a label means is worked out here once more, from the documentation and in the plainest way, and so are the flat
tensors that the reference is asked about: nothing of the engine is used.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from dialect import ALRP, AP, DEPTH, FLOAT_MAX, INF, NAN, NDCG, PLAIN_AP, RANK_SORT, WEIGHTED, Member
from fuzz_draw import FLOATS, Draw, Flavour, lay_out
from torch import Tensor

MEMBERS = (ALRP, ALRP, AP, PLAIN_AP, NDCG, RANK_SORT, WEIGHTED, DEPTH)
"""aLRP Loss twice, for its two ways to rank localisation errors."""
INTEGERS = (torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IGNORE_INDICES = (-1, -1, -1, -1, 255, -100, 0, 1, 2, 7, 128, 300, 2**40, 2**63 - 1, -(2**63))
UPSTREAMS = (1.0, 1.0, 1.0, -0.5, 0.3, 2.0**-20, 65536.0, 0.0)
MODES = ("grad", "grad", "grad", "backward", "backward", "frozen", "no_grad", "inference")
"""How the loss is called: each component differentiated by itself, all together by ``backward`` through tensors that
are no leaves, without anything that requires a gradient, and where nothing is recorded."""


@dataclasses.dataclass
class Problem:
    """One call, and what is known of it without the engine."""

    member: Member
    backend: str
    logits: list[Tensor]
    labels: list[Tensor]
    groups: list[Tensor] | None
    values: Tensor
    """``[P]``, also for the members that take none."""
    arguments: dict[str, Any]
    mode: str
    upstream: float
    in_a_sequence: bool
    requires_grad: list[bool]
    """Of each level; at least one, where there is a level."""
    piece: int | None
    """How many logits the backends are to look at in one step, where it is not their own choice."""
    threads: int
    flat_labels: Tensor
    """``[M]``: 1 positive, 0 negative, -1 ignored."""

    @property
    def flat_logits(self) -> Tensor:
        return torch.cat([level.detach().reshape(-1) for level in self.logits])

    @property
    def flat_groups(self) -> Tensor | None:
        if self.groups is None:
            return None
        each = zip(self.logits, self.groups)
        return torch.cat(
            [(g if g.dim() == x.dim() else g[..., None]).expand(x.shape).reshape(-1).long() for x, g in each]
        )

    @property
    def double(self) -> bool:
        """Whether scores are compared in float64."""
        return self.logits[0].dtype == torch.float64


def draw_problem(seed: int, index: int, backends: Sequence[str], small: bool = False) -> Problem:
    """The problem of an index; ``small`` ones have few logits."""
    draw = Draw(seed, index)
    member, backend = draw.choice(MEMBERS), draw.choice(backends)
    delta = draw.choice(FEW_DELTAS) if small else _draw_delta(draw)
    dtype, ignore_index = draw.choice(FLOATS), draw.choice(IGNORE_INDICES)
    budget = draw.choice([3, 12, 40, 40, 40 if small else 200, 60 if small else 400])
    if not small and draw.chance(0.01):
        budget = 20_000
    shapes = [_draw_shape(draw, budget) for _ in range(draw.choice([1, 1, 1, 2, 3, 5]))]
    logits, labels, flat_labels = [], [], []
    kinds = draw.choice(
        [(0.3, 0.1), (0.3, 0.1), (0.1, 0.0), (0.05, 0.5), (0.0, 0.1), (1.0, 0.0), (0.8, 0.2), (0.0, 1.0)]
    )
    flavour = Flavour(draw, delta, dtype)
    for shape in shapes:
        y = _draw_labels(draw, shape, ignore_index, *kinds)
        meaning = what_labels_mean(shape, y, ignore_index)
        assert not (meaning == -2).any()
        x = _draw_logits(draw, shape, meaning, flavour)
        logits.append(x)
        labels.append(lay_out(draw, y, 1))
        flat_labels.append(meaning.reshape(-1))
    flat = torch.cat(flat_labels)
    if int((flat == 1).sum()) > 150:  # the reference looks at every pair
        return draw_problem(seed, index + 10**9, backends, small)
    num_pos = int((flat == 1).sum())
    sequence = len(shapes) > 1 or draw.chance(0.2)
    arguments: dict[str, Any] = {"delta": delta, "ignore_index": ignore_index}
    if member is ALRP:
        arguments["loc_ranking"] = draw.choice(["sorted", "smooth"])
    if member is ALRP or (member is DEPTH and draw.chance(0.5)):
        arguments["eps"] = draw.choice([1e-5, 1e-5, 0.0, 0.3, 1, INF])
    if not member.takes and draw.chance(0.5):
        arguments["num_positives"] = num_pos
    requires_grad = [draw.chance(0.8) for _ in shapes]
    requires_grad[draw.whole(0, len(shapes) - 1)] = True
    return Problem(
        member=member,
        backend=backend,
        logits=logits,
        labels=labels,
        groups=_draw_groups(draw, shapes),
        values=_draw_values(draw, num_pos),
        arguments=arguments,
        mode=draw.choice(MODES),
        upstream=draw.choice(UPSTREAMS),
        in_a_sequence=sequence,
        requires_grad=requires_grad,
        piece=draw.choice([None, None, None, 1, 7, 64, 1000]),
        threads=draw.choice([1, 1, 2, 3]),
        flat_labels=flat,
    )


def what_labels_mean(shape: Sequence[int], labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of logits of a shape as 1 positive, 0 negative, -1 ignored, -2 out of range, for each logit. A label says
    what its number says, as Python counts: a narrow dtype wraps nothing."""
    meanings = []
    columns = shape[-1]
    per_class = labels.dim() < len(shape)
    for label in labels.reshape(-1).tolist():
        if per_class:
            if label == ignore_index:
                meanings.append([-1] * columns)
            elif 0 <= label <= columns:
                meanings.append([int(column == label) for column in range(columns)])
            else:
                meanings.append([-2] * columns)
        else:
            meanings.append([-1 if label == ignore_index else label if label in (0, 1) else -2])
    return torch.tensor([m for row in meanings for m in row], dtype=torch.int64).view(tuple(shape))


# Kernels are compiled anew for each.
FEW_DELTAS = [1.0, 1.0, 0.5, 0.0, 1e-30, 1e30]


def _draw_delta(draw: Draw) -> float:
    options: list[float] = [1.0, 1.0, 0.5, 0.1, 0, 0.0, 2, 1e-30, 1e30, 10 ** (-30 + 60 * draw.random.random())]
    return draw.choice(options)


def _draw_shape(draw: Draw, budget: int) -> tuple[int, ...]:
    if draw.chance(0.07):
        return draw.choice([(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)])
    columns = draw.choice([1, 1, 2, 3, 5, 8, 20, 80, 127, 128, 255, 256, 300])
    if draw.chance(0.25) or columns > budget:
        return (draw.whole(1, budget),)
    rows, leading = max(1, budget // columns), draw.whole(1, 3)
    shape = [1] * leading
    while math.prod(shape) < rows and draw.chance(0.97):
        shape[draw.whole(0, leading - 1)] += 1
    return (*shape, columns)


def _draw_labels(draw: Draw, shape: tuple[int, ...], ignore_index: int, positive: float, ignored: float) -> Tensor:
    """Labels in range, by row or by logit, in a dtype that can hold them."""
    per_class = draw.chance(0.5)
    of = shape[:-1] if per_class else shape
    columns, dtype = shape[-1], draw.choice(INTEGERS)
    limits = torch.iinfo(dtype)
    expand = _draw_expanded(draw, of)
    size = math.prod(expand)
    kind = draw.uniform(size)
    classes = draw.integers(0, max(1, columns), size) if per_class else torch.ones(size, dtype=torch.int64)
    negative = columns if per_class else 0
    y = torch.where(kind < positive, classes, negative)
    if limits.min <= ignore_index <= limits.max:
        y = torch.where(kind >= 1 - ignored, ignore_index, y)
    if len(y) and int(y.max()) > limits.max:
        if columns == 0 or not draw.chance(0.5):
            dtype = torch.int64
        else:  # no label names the background: all rows are positive, of the classes that have a name
            y = torch.where(y > limits.max, 0 if ignore_index != 0 else 1, y)
    if per_class and columns == 0:
        y = torch.zeros_like(y)  # the background of no classes
    return y.to(dtype).view(expand).expand(of)


def _draw_expanded(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that expands to this one; as a rule, itself."""
    if not draw.chance(0.12):
        return shape
    return tuple(1 if n > 0 and draw.chance(0.5) else n for n in shape)


def _draw_logits(draw: Draw, shape: tuple[int, ...], meaning: Tensor, flavour: Flavour) -> Tensor:
    size, how = meaning.numel(), draw.random.random()
    if how < 0.1:
        expand = _draw_expanded(draw, shape)
        return flavour.scores(math.prod(expand)).view(expand).expand(shape)
    if how < 0.13 and size:
        # Overlapping windows: no two elements need to differ in where they lie.
        strides = [draw.whole(0, 2) for _ in shape]
        needed = 1 + sum(stride * (n - 1) for stride, n in zip(strides, shape))
        return flavour.scores(needed + 2).as_strided(shape, strides, draw.whole(0, 2))
    x = flavour.scores(size).view(shape)
    if flavour.apart and flavour.limits.bits > 16:
        x = torch.where(meaning == 1, x + flavour.apart, x)
    if flavour.nan_where_ignored:
        x = x.masked_fill(meaning == -1, NAN)
    if flavour.nan and size:
        x.view(-1)[draw.whole(0, size - 1)] = NAN
    return lay_out(draw, x, NAN)


def _draw_groups(draw: Draw, shapes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
    if draw.chance(0.6):
        return None
    far = [-(2**63), 2**63 - 1, 2**40, -1, 0, 5, 2**62, -(2**62)]
    dtype = draw.choice(INTEGERS)
    ids = [0, 1, 2, 3] if dtype != torch.int64 or draw.chance(0.5) else draw.random.sample(far, 3)
    ids = ids[: draw.choice([1, 2, 3, 4])]
    groups = []
    for shape in shapes:
        of = shape if draw.chance(0.4) else shape[:-1]
        expand = _draw_expanded(draw, of)
        chosen = torch.tensor(ids)[draw.integers(0, len(ids), math.prod(expand))]
        if draw.chance(0.4):
            chosen = chosen.sort().values
        groups.append(lay_out(draw, chosen.to(dtype).view(expand).expand(of), 0))
    return groups


def _draw_values(draw: Draw, num_pos: int) -> Tensor:
    values = draw.uniform(num_pos)
    values = draw.choice([values, (4 * values).round() / 4, 4 * values, values * 0, 1 - values / 1e6])
    special = draw.choice([*[None] * 9, NAN, INF, -INF, -0.5, 1e30, FLOAT_MAX, 1e200, 1e300])
    if special is not None and num_pos:
        values = torch.where(draw.uniform(num_pos) < draw.choice([0.05, 0.5]), special, values)
    dtype = draw.choice(FLOATS)
    if num_pos and draw.chance(0.05):
        return values[:1].to(dtype).expand(num_pos)
    return lay_out(draw, values.to(dtype), NAN)


def storages(problem: Problem) -> list[Tensor]:
    """The bytes of all that is handed to the loss, with what lies around and between."""
    tensors = itertools.chain(problem.logits, problem.labels, problem.groups or [], [problem.values])
    return [bytes_of(tensor) for tensor in tensors]


def bytes_of(tensor: Tensor) -> Tensor:
    """A copy of a tensor's whole memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).clone()
