"""What tests are written in.

- Hard inputs (``cases``): :class:`Case`, one problem with labels; :func:`all_cases`, those with a name;
  :func:`problems`, drawn ones; :data:`GOLDEN`, what the authors' code returned. Where kernels run, :data:`KERNELS`.
- Comparing (``checks``): :func:`backends` are those that run here; :func:`assert_close`, :func:`assert_same_bits`, ...
- Members of the family (``family``): :class:`Member`, a loss and its judge, all in :data:`FAMILY`. :func:`of_case` is
  what a loss gives for a case, :func:`judge` what the float64 reference says, :func:`assert_agree` compares the two.
- Theorems (``plain``): each loss in loops over Python's numbers, which share nothing with the package.
- Groups (``grouping``): cases of several rankings, and :func:`separately`, what one call for each of them gives.
- PyTorch's modes (``modes``): :class:`Detector`, a small model with one of :data:`CRITERIA`; :func:`step` trains it.
- Passes (``passes``): both passes over the logits, compiled against PyTorch's.
- Marks: :data:`by_backend`, :data:`by_member`, :data:`by_criterion`, ... run a test with each of these.

Not imported from here, for what they import: ``dialect.interpreters`` runs code in new processes, ``dialect.processes``
has several rank together, ``dialect.kernel_session`` has kernels run on the virtual GPU.
"""

from .cases import (
    BORROWED,
    COMPILED_FOR,
    FLOAT_MAX,
    GOLDEN,
    INF,
    INTERPRETED,
    KERNELS,
    NAN,
    REGIMES,
    Case,
    all_cases,
    drawn_case,
    listed_case,
    load_golden,
    problems,
    random_case,
    random_labels,
    repeatable,
)
from .checks import (
    EXACT,
    assert_close,
    assert_rounded,
    assert_same_bits,
    assert_same_sums,
    assert_split_alike,
    backends,
    by_backend,
    by_engine_backend,
    engine_backends,
    threads,
)
from .family import (
    ALRP,
    AP,
    APE,
    DEPTH,
    FAMILY,
    NDCG,
    PLAIN_AP,
    RANK_SORT,
    WEIGHTED,
    Member,
    Results,
    assert_agree,
    assert_all_nan,
    assert_right,
    assert_same_results,
    by_member,
    by_member_sparing,
    depth_error,
    depth_normaliser,
    depth_target,
    evaluate,
    formula,
    imprecision,
    judge,
    of_case,
    squared_ramp,
    weighted_error,
)
from .grouping import GROUPED, by_grouped, by_some_grouped, draw_groups, grouped_case, problem_of_images, separately
from .modes import CLASSES, CRITERIA, MODULES, Criterion, Detector, by_criterion, make_batch, step
from .passes import assert_same_passes, late_levels, layouts
from .plain import PLAIN, Plain
