"""Frames of HTTP/2 (RFC 9113, section 4), followed but not decoded: how many requests a connection
asks for, which of its streams are open, and how much it sends.

Nine bytes of each frame are read, never its payload. What is let through is passed on unchanged.
"""

from __future__ import annotations

from agentcgroupd.errors import AgentcgroupdError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first (section 3.4)."""
FRAME_BYTES_MAX = 16_384
"""The largest payload of a frame where nothing else was agreed upon (section 4.2)."""
HEADER_BLOCK_BYTES_MAX = 32_768
"""The most that HEADERS and the CONTINUATION frames after it may hold together."""
FRAME_COST_BYTES = 128
"""What a frame counts beside its length: many tiny ones are dearer than a large one."""
_HEAD_BYTES = 9
_DATA, _HEADERS, _RST_STREAM, _CONTINUATION = 0x0, 0x1, 0x3, 0x9
_END_STREAM, _END_HEADERS = 0x1, 0x4


class BadFrame(AgentcgroupdError):
    """A peer sent what no client of gRPC sends."""


class Streams:
    """Streams of one connection."""

    __slots__ = ("last", "open", "unfinished")

    def __init__(self) -> None:
        self.last = 0
        self.open: set[int] = set()
        """Streams that the server has not ended."""
        self.unfinished: dict[int, float] = {}
        """When a stream was opened whose request has not been sent to its end."""

    def ended(self, stream: int) -> None:
        """Note that a stream is over."""
        self.open.discard(stream)
        self.unfinished.pop(stream, None)


class Reader:
    """Follows the frames of one direction through a buffer that grows at its end."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._left = 0
        """Bytes of the current frame that have not come by yet."""
        self._block_bytes = 0
        """Size of the header block that is being sent; 0: none is."""

    def passed(self, data: bytes | bytearray, at: int) -> int:
        """Where the part of a frame that was begun before ends in `data`, which it is in at
        `at`."""
        taken = min(self._left, len(data) - at)
        self._left -= taken
        return at + taken

    def head(self, data: bytes | bytearray, at: int) -> tuple[int, int, int, int] | None:
        """Length, type, flags and stream of the frame whose head is at `at`; None: it is not there
        in full."""
        if len(data) - at < _HEAD_BYTES:
            return None
        length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
        stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFF_FFFF
        return length, data[at + 3], data[at + 4], stream

    def enter(self, length: int) -> None:
        """Note that a frame has begun: its head and payload come by next."""
        self._left = _HEAD_BYTES + length

    def is_request(self, kind: int, stream: int) -> bool:
        """Whether a frame of the client opens a stream."""
        return kind == _HEADERS and stream > self._streams.last

    def from_client(self, length: int, kind: int, flags: int, stream: int, now: float) -> None:
        """Take note of a frame of the client's. Raises BadFrame."""
        if length > FRAME_BYTES_MAX:
            raise BadFrame(f"a frame of {length} bytes")
        streams = self._streams
        if kind in (_HEADERS, _CONTINUATION):
            self._block_bytes += length + 1
            if self._block_bytes > HEADER_BLOCK_BYTES_MAX:
                raise BadFrame(f"more than {HEADER_BLOCK_BYTES_MAX} bytes of headers")
            if flags & _END_HEADERS:
                self._block_bytes = 0
        if kind == _HEADERS and stream > streams.last:
            streams.last = stream
            streams.open.add(stream)
            streams.unfinished[stream] = now
        if kind in (_HEADERS, _DATA) and flags & _END_STREAM:
            streams.unfinished.pop(stream, None)
        elif kind == _RST_STREAM:
            streams.ended(stream)

    def from_server(self, kind: int, flags: int, stream: int) -> None:
        """Take note of a frame of the server's."""
        if kind == _RST_STREAM or (kind in (_HEADERS, _DATA) and flags & _END_STREAM):
            self._streams.ended(stream)
