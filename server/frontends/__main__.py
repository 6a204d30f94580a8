"""python -m server.frontends DESCRIPTOR; started by the inference process and by nobody else."""

import sys

from server import heap
from server.frontends.process import main

heap.settle()
sys.exit(main(int(sys.argv[1])))
