"""A headless Chromium that a test drives through a pair of pipes, with the protocol of its
developer tools: nothing listens, and no other library is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = os.environ.get("AGENTCG_CHROMIUM")
"""Only where it is asked for: a browser takes its time to start."""
ANSWER_S = 60.0
_COMMANDS_FD, _ANSWERS_FD = 3, 4
"""Where Chromium reads and writes with --remote-debugging-pipe."""


class Chromium:
    """A page in a browser of its own; ended with the `with` block.

    told: what the page wrote to its console and was refused by its own policy, errors above all.
    """

    def __init__(self, directory: Path) -> None:
        self.told: list[str] = []
        self._number, self._unread, self._session = 0, b"", ""
        commands_read, self._commands = os.pipe()
        self._answers, answers_write = os.pipe()
        command = [
            PROGRAM or "chromium",
            "--headless=new",
            "--no-sandbox",  # which wants another user than root
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={directory}/profile",
            "about:blank",
        ]
        # The shell puts the pipes where they are expected (sh knows descriptors up to 9 only).
        moved = f'exec "$@" {_COMMANDS_FD}<&{commands_read} {_ANSWERS_FD}>&{answers_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *command],
            pass_fds=(commands_read, answers_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(directory)},
        )
        os.close(commands_read)
        os.close(answers_write)

    def __enter__(self) -> Chromium:
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError, RuntimeError, TimeoutError):
            self._session = ""
            self._send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + ANSWER_S
        while True:
            answer = self._read(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._unread += data
        raw, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(raw)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.told.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.told.append(json.dumps(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.told.append(json.dumps(params["args"]))

    def size(self, width: int, height: int) -> None:
        """Make the page so large."""
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def dark(self, is_dark: bool) -> None:
        """Prefer dark colours, or light ones."""
        value = "dark" if is_dark else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self._send("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str) -> None:
        """Go to an address."""
        self._send("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """Return what an expression of JavaScript gives."""
        found = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until an expression is true, and return it."""
        until = time.monotonic() + ANSWER_S
        while not (found := self.value(script)):
            if time.monotonic() > until:
                raise TimeoutError(f"{script} did not become true; the page said {self.told}")
            time.sleep(0.1)
        return found

    def point(self, x: float, y: float, click: bool = False) -> None:
        """Move the pointer to a place, and click there."""
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        data = self._send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
