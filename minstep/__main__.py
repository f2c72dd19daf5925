"""`python -m minstep` is the command line."""

import sys

from minstep.cli import main

sys.exit(main())
