"""python -m server.frontends DESCRIPTOR; started by the inference process and by nobody else."""

import sys

from server.frontends.process import main

sys.exit(main(int(sys.argv[1])))
