"""``python -m alrp_triton.cli``, the command ``alrp-triton``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
