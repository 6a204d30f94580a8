"""The events of a stream, written around a piece of text: nothing but the piece differs between a thousand of them."""

from __future__ import annotations

from typing import Any

import msgspec

encode = msgspec.json.encode


class EventLines:
    """What the events of one answer are made of."""

    def __init__(self, frame: msgspec.Struct, before: bytes, behind: bytes, opening: bytes | None = None) -> None:
        """frame: the answer with its choices, which are none, at its end. before, behind: what is around the text in a
        choice. opening: what stands there in the first event of an index; None: there is none before the first text."""
        whole = encode(frame)
        assert whole.endswith(b'"choices":[]}'), "the choices are put in there"
        self.frame = b"data: " + whole[:-2]
        self.before, self.opening = before, opening
        self.behind = behind + b',"logprobs":'
        self.fronts: dict[int, bytes] = {}

    def event(self, index: int, text: str, logprobs: Any, reason: str | None) -> bytes:
        """Of one answer, the first time with its opening."""
        opened = b""
        front = self.fronts.get(index)
        if front is None:
            begun = self.frame + b'{"index":%d,' % index
            if self.opening is not None:
                opened = begun + self.opening + b',"logprobs":null,"finish_reason":null}]}\n\n'
            front = self.fronts[index] = begun + self.before
        noted = b"null" if logprobs is None else encode(logprobs)
        end = b',"finish_reason":null}]}\n\n' if reason is None else b',"finish_reason":"%b"}]}\n\n' % reason.encode()
        return b"".join((opened, front, encode(text), self.behind, noted, end))

    def usage(self, usage: msgspec.Struct) -> bytes:
        """The event without choices, at the end."""
        return self.frame + b'],"usage":' + encode(usage) + b"}\n\n"
