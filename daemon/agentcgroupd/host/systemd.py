"""Messages to systemd about the service's state, as sd_notify(3) sends them."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(*assignments: str) -> bool:
    """Send assignments such as READY=1. Returns False if systemd did not start this process, or
    does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            log.warning("sd_notify: %s", error)
            return False
    return True


def watchdog_interval_s() -> float:
    """Interval of the watchdog's messages in seconds: half of WatchdogSec=, as
    sd_watchdog_enabled(3) advises; 0 without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
