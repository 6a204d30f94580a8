"""How wrong data is named: where it lies and what is wrong with it."""

from __future__ import annotations

import msgspec


class BadFile(ValueError):
    """A file nothing can be learned from; the message says what is wrong and where."""


class Problem(msgspec.Struct, frozen=True):
    """One item that cannot be used. `place`: a member of an archive, or a line or row of a table."""

    place: str
    message: str
