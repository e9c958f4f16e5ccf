"""`python -m daybreak` is the command `daybreak`."""

import sys

from daybreak.cli.main import main

sys.exit(main())
