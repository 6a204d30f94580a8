"""Inspect a file in a process of its own: python -m finetune.data.inspection PATH FILENAME

A decoder that crashes or eats memory on a hostile file takes this process with it and not the server, and the work
does not slow down the answers. Prints the report as JSON; a file that cannot be used ends it with status 3 and the
reason on standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from finetune.data.problems import BadFile
from finetune.data.validation import inspect

BAD_FILE = 3


def main() -> int:
    os.nice(10)
    try:
        report = inspect(Path(sys.argv[1]), sys.argv[2])
    except BadFile as error:
        print(error, file=sys.stderr)
        return BAD_FILE
    sys.stdout.buffer.write(msgspec.json.encode(report))
    sys.stdout.flush()
    os._exit(0)  # at once: a reading thread of pyarrow's that is still ending would abort the orderly way


if __name__ == "__main__":
    sys.exit(main())
