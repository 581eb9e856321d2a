"""Strategies for hostile problems: shapes, dtypes, strides, labels, groups and numbers of every kind.

What a label means is worked out here once more, from the documentation and in the plainest way, and so are the flat
tensors that the reference is asked about: nothing of the engine is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from dialect import ALRP, AP, APE, DEPTH, FLOAT_MAX, INF, NAN, NDCG, PLAIN_AP, RANK_SORT, WEIGHTED, Member
from fuzz_draw import FLOATS, NUMBERS, Flavour, draw_shape, expandable, lay_out, odds, one_of, whole
from hypothesis import strategies as st
from torch import Tensor

MEMBERS = one_of(AP, ALRP, ALRP, PLAIN_AP, NDCG, RANK_SORT, WEIGHTED, DEPTH, APE)
"""aLRP Loss twice, for its two ways to rank localisation errors."""
INTEGERS = one_of(torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IGNORE_INDICES = one_of(-1, -1, -1, -1, 255, -100, 0, 1, 2, 7, 128, 300, 2**40, 2**63 - 1, -(2**63))
UPSTREAMS = one_of(1.0, 1.0, 1.0, -0.5, 0.3, 2.0**-20, 65536.0, 0.0)
MODES = one_of("grad", "grad", "grad", "backward", "backward", "frozen", "no_grad", "inference")
"""How the loss is called: each component differentiated by itself, all together by ``backward`` through tensors that
are no leaves, without anything that requires a gradient, and where nothing is recorded."""
# Kernels are compiled anew for each.
FEW_DELTAS = one_of(1.0, 1.0, 0.5, 0.0, 1e-30, 1e30)
DELTAS = st.one_of(*[one_of(1.0, 0.5, 0.1, 0, 0.0, 2, 1e-30, 1e30)] * 9, st.floats(-29, 29).map(lambda p: 10**p))
SHARES = one_of((0.3, 0.1), (0.3, 0.1), (0.1, 0.0), (0.05, 0.5), (0.0, 0.1), (1.0, 0.0), (0.8, 0.2), (0.0, 1.0))
"""Of labels that are positive, and that are ignored."""
MOST_POSITIVES = 150
"""The reference looks at every pair."""


@dataclasses.dataclass(repr=False)
class Problem:
    """One call, and what is known of it without the engine."""

    title: tuple[str, str]
    """The loss, with its way to rank, and the backend, whatever a mistake makes of them."""
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
    expected: tuple[type[Exception], str] | None = None
    """What is to be raised, and which argument it names, where one is wrong."""

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

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows of a case that fails."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        lines = [f"{self.member.name} by {self.backend!r}, {self.arguments}"]
        for name in ("logits", "labels", "groups"):
            lines.append(f"{name}: " + "; ".join(_form(tensor) for tensor in getattr(self, name) or []))
        counts = Counter(self.flat_labels.tolist())
        lines.append(
            f"values: {_form(self.values)}; {counts[1]} positives, {counts[0]} negatives, {counts[-1]} ignored"
        )
        names = ("mode", "upstream", "in_a_sequence", "requires_grad", "piece", "threads", "expected")
        return "\n  ".join([*lines, ", ".join(f"{name} {getattr(self, name)}" for name in names)])


def _form(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    if tensor.layout != torch.strided or tensor.is_meta:
        return f"{tensor.device}, {tensor.layout}, {tensor.dtype}"
    numbers = f" {tensor.tolist()}" if tensor.numel() <= 12 else ""
    negated = " negated" if tensor.is_neg() else ""
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)} by {list(tensor.stride())}{negated}{numbers}"


@st.composite
def problems(draw: st.DrawFn, backends: Sequence[str], small: bool = False) -> Problem:
    """Problems without a mistake; ``small`` ones have few logits."""
    member, backend = draw(MEMBERS), draw(one_of(*backends))
    delta, dtype, ignore_index = draw(FEW_DELTAS if small else DELTAS), draw(one_of(*FLOATS)), draw(IGNORE_INDICES)
    budget = draw(one_of(3, 12, 40, 40, 40, 60) if small else one_of(3, 12, 40, 40, 200, 400))
    if not small and draw(odds(1)):
        budget = 20_000
    shares, flavour = draw(SHARES), Flavour(draw, delta, dtype)
    logits, labels, meanings, num_pos = [], [], [], 0
    for _ in range(draw(one_of(1, 1, 1, 2, 3, 5))):
        shape = draw_shape(draw, budget)
        y = _labels(draw, shape, ignore_index, *shares, MOST_POSITIVES - num_pos)
        meanings.append(what_labels_mean(shape, y, ignore_index))
        num_pos += int((meanings[-1] == 1).sum())
        logits.append(_logits(draw, shape, meanings[-1], flavour))
        labels.append(lay_out(draw, y, 1))
    arguments: dict[str, Any] = {"delta": delta, "ignore_index": ignore_index}
    if member is ALRP:
        arguments["loc_ranking"] = draw(one_of("sorted", "smooth"))
    if member is ALRP or (member is DEPTH and draw(st.booleans())):
        arguments["eps"] = draw(one_of(1e-5, 1e-5, 0.0, 0.3, 1, INF))
    if not member.takes and draw(st.booleans()):
        arguments["num_positives"] = num_pos
    requires_grad = [not draw(odds(20)) for _ in logits]
    requires_grad[draw(whole(0, len(logits) - 1))] = True
    return Problem(
        title=(" ".join([member.name, *([arguments["loc_ranking"]] if member is ALRP else [])]), backend),
        member=member,
        backend=backend,
        logits=logits,
        labels=labels,
        groups=_groups(draw, [x.shape for x in logits]) if draw(odds(40)) else None,
        values=_values(draw, num_pos),
        arguments=arguments,
        mode=draw(MODES),
        upstream=draw(UPSTREAMS),
        in_a_sequence=len(logits) > 1 or draw(odds(20)),
        requires_grad=requires_grad,
        piece=draw(one_of(None, None, None, 1, 7, 64, 1000) if budget < 20_000 else one_of(None, 1000)),
        threads=draw(one_of(1, 1, 2, 3)),
        flat_labels=torch.cat([meaning.reshape(-1) for meaning in meanings]),
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


def _labels(
    draw: st.DrawFn, shape: tuple[int, ...], ignore_index: int, positive: float, ignored: float, room: int
) -> Tensor:
    """Labels in range, by row or by logit, in a dtype that can hold them (those by logit also in one that holds no
    integers); at most ``room`` are positive."""
    columns, dtype, numbers, per_class = shape[-1], draw(INTEGERS), draw(NUMBERS), draw(st.booleans())
    of = shape[:-1] if per_class else shape
    expand, limits = expandable(draw, of), torch.iinfo(dtype)
    size = math.prod(expand)
    room = room * size // max(1, math.prod(of))
    kind = numbers.uniform(size)
    if 0 < size <= 8 and draw(odds(40)):
        kind = torch.tensor([draw(one_of(0.5, 0.0, 0.999)) for _ in range(size)])
    chosen = (kind < positive) & (kind.argsort().argsort() < room)
    classes = numbers.whole(0, max(1, columns), size) if per_class else 1
    y = torch.where(chosen, classes, columns if per_class else 0)
    if limits.min <= ignore_index <= limits.max:
        y = y.masked_fill(kind >= 1 - ignored, ignore_index)
    if size and int(y.max()) > limits.max:
        if 0 < size <= room and draw(st.booleans()):
            # No label names the background: all rows are positive, of the classes that have a name.
            y = y.masked_fill(y > limits.max, 0 if ignore_index != 0 else 1)
        else:
            dtype = torch.int64
    if per_class and columns == 0:
        y = torch.zeros_like(y)  # the background of no classes
    if not per_class and abs(ignore_index) <= 2**24 and draw(odds(15)):
        dtype = torch.bool if bool(((y == 0) | (y == 1)).all()) and draw(st.booleans()) else torch.float32
    return y.to(dtype).view(expand).expand(of)


def _logits(draw: st.DrawFn, shape: tuple[int, ...], meaning: Tensor, flavour: Flavour) -> Tensor:
    if draw(odds(10)):
        expand = expandable(draw, shape)
        return flavour.scores(draw, math.prod(expand)).view(expand).expand(shape)
    if draw(odds(3)) and meaning.numel():
        # Overlapping windows: no two elements need to differ in where they lie.
        strides = [draw(whole(0, 2)) for _ in shape]
        needed = 1 + sum(stride * (n - 1) for stride, n in zip(strides, shape))
        return flavour.scores(draw, needed + 2).as_strided(shape, strides, draw(whole(0, 2)))
    x = flavour.scores(draw, meaning.numel()).view(shape)
    if flavour.apart and x.dtype.itemsize > 2:
        x = torch.where(meaning == 1, x + flavour.apart, x)
    if flavour.nan_where_ignored:
        x = x.masked_fill(meaning == -1, NAN)
    if flavour.nan and meaning.numel():
        x = x.clone()
        x.view(-1)[draw(whole(0, x.numel() - 1))] = NAN
    return lay_out(draw, x, NAN)


def _groups(draw: st.DrawFn, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    dtype, ids = draw(INTEGERS), [0, 1, 2, 3]
    if dtype == torch.int64 and draw(st.booleans()):
        ids = [-(2**63), 0, 2**63 - 1, -1, 2**62, 5, -(2**62), 2**40][draw(whole(0, 6)) :]
    ids = torch.tensor(ids[: draw(whole(1, 4))])
    groups = []
    for shape in shapes:
        of = shape if draw(odds(40)) else shape[:-1]
        expand = expandable(draw, of)
        chosen = ids[draw(NUMBERS).whole(0, len(ids), math.prod(expand))]
        if draw(odds(40)):
            chosen = chosen.sort().values
        groups.append(lay_out(draw, chosen.to(dtype).view(expand).expand(of), 0))
    return groups


def _values(draw: st.DrawFn, num_pos: int) -> Tensor:
    numbers, dtype, how = draw(NUMBERS), draw(one_of(*FLOATS)), draw(whole(0, 4))
    values = numbers.uniform(num_pos)
    values = [(4 * values).round() / 4, values, 4 * values, values * 0, 1 - values / 1e6][how]
    special = draw(one_of(*[None] * 9, NAN, INF, -INF, -0.5, 1e30, FLOAT_MAX, 1e200, 1e300))
    if special is not None:
        values = torch.where(numbers.uniform(num_pos) < draw(one_of(0.05, 0.5)), special, values)
    if num_pos and draw(odds(5)):
        return values[:1].to(dtype).expand(num_pos)
    return lay_out(draw, values.to(dtype), NAN)
