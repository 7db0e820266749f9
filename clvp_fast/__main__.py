"""`python -m clvp_fast` is `clvp-fast`."""

import sys

from clvp_fast.cli import main

sys.exit(main())
