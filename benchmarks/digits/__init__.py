"""The ablations of the aLRP Loss paper in miniature: one small RetinaNet on scenes of handwritten digits.

    python -m benchmarks.digits              # trains what is missing, then tables and figures; may be interrupted
    python -m benchmarks.digits --report     # tables and figures of what has been trained

Needs the extras ``bench`` and ``demo``, and a source tree: the scenes and the detector are those of
``examples/digits``. :mod:`.settings` says what is compared, :mod:`.run` trains and evaluates one model,
:mod:`.schedule` decides which runs are missing, :mod:`.report` writes tables and figures of docs/design/experiments.md.
Stores, workers and tables are those of :mod:`benchmarks.training`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"
if str(DIGITS) not in sys.path:  # a folder of scripts, which import one another by their plain names
    sys.path.insert(0, str(DIGITS))
