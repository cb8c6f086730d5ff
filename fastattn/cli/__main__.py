"""`python -m fastattn.cli`, the same as the `fastattn` command."""

import sys

from fastattn.cli import main

sys.exit(main())
