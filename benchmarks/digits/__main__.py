"""``python -m benchmarks.digits``."""

import sys

from .experiments import main

if __name__ == "__main__":
    sys.exit(main())
