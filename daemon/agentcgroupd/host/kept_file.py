"""Files of /proc that are read again and again, also when no descriptor is left."""

from __future__ import annotations

import os

_READ_BYTES = 65_536


class KeptFile:
    """A file that is opened once, for as long as the process lives."""

    _fd = -1

    def __init__(self, path: str) -> None:
        """Open it. Raises OSError."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self) -> bytes:
        """Read its content as it is now. Raises OSError."""
        data = b""
        while more := os.pread(self._fd, _READ_BYTES, len(data)):
            data += more
        return data
