"""`python -m server`: the same as `espalier serve`."""

import sys

from server.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
