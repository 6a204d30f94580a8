"""A multipart/form-data body, read as it arrives: memory holds one network chunk, whatever the size of the file.

Litestar's own form parsing writes every file to a temporary place first and tells nothing before the last byte is in;
here the bytes of the file go straight to whoever asks for them, and a limit acts on the byte that crosses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import ApiError

FIELD_LIMIT = 64 * 1024


class Part(msgspec.Struct, frozen=True):
    """The head of one part of the form; `filename` is None for an ordinary field."""

    name: str
    filename: str | None


class _End(msgspec.Struct, frozen=True):
    """A part is complete."""


class UploadForm:
    """One form with one file in it. `next_file`, then `content` to its end, then `next_file` again until it is None.

    `fields` holds the ordinary fields met so far. Raises ApiError 400 for a body that is no form, or ends too early,
    and 413 for an ordinary field of more than 64 KiB.
    """

    def __init__(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(400, "expected a multipart/form-data body, with its boundary in the content type")
        self.fields: dict[str, str] = {}
        self._body = body
        self._events: deque[Part | bytes | _End] = deque()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_begin": self._on_header_begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_part,
                    "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
                    "on_part_end": lambda: self._events.append(_End()),
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise ApiError(400, f"multipart/form-data: {error}") from error

    def _on_header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def _on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _on_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        name, filename = options.get(b"name"), options.get(b"filename")
        if name is None:
            raise ApiError(400, "multipart/form-data: a part has no name")
        named = None if filename is None else filename.decode("utf-8", "replace")
        self._events.append(Part(name.decode("utf-8", "replace"), named))

    def _on_end(self) -> None:
        self._complete = True

    async def _next(self) -> Part | bytes | _End | None:
        """The next thing in the form, reading on when needed; None after its closing boundary."""
        while not self._events:
            chunk = await anext(self._body, b"")
            if not chunk:
                if self._complete:
                    return None
                raise ApiError(400, "the body ends before the form's closing boundary: the upload was cut off")
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise ApiError(400, f"multipart/form-data: {error}") from error
        return self._events.popleft()

    async def next_file(self) -> Part | None:
        """Read fields up to the next file and return its head; None when the form is over."""
        while (event := await self._next()) is not None:
            if not isinstance(event, Part):
                continue
            if event.filename is not None:
                return event
            value = bytearray()
            while isinstance(piece := await self._next(), bytes):
                value += piece
                if len(value) > FIELD_LIMIT:
                    raise ApiError(413, f"field {event.name}: more than {FIELD_LIMIT} bytes", param=event.name)
            self.fields[event.name] = value.decode("utf-8", "replace")
        return None

    async def content(self) -> AsyncIterator[bytes]:
        """The bytes of the file whose head `next_file` has just returned."""
        while isinstance(piece := await self._next(), bytes):
            yield piece
