"""`otel`: a span of OpenTelemetry for each ended call."""

from __future__ import annotations

import argparse
import os
import signal
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agentcgroup import errors

from . import common
from .audit import moment
from .output import complain, print_json_line, say
from .summaries import summary

if TYPE_CHECKING:
    from agentcgroup.otel.sending import Counts

ENDPOINT = "http://127.0.0.1:4318/v1/traces"
TIMEOUT_S = 10.0


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    parser = common.command(subparsers, "otel", run_otel, summary("otel"))
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="where an OTLP receiver takes traces over HTTP; without TLS only on loopback "
        f"(default: that of OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or _ENDPOINT, else {ENDPOINT})",
    )
    parser.add_argument(
        "--since",
        type=moment,
        metavar="TIME",
        default=0,
        help="also calls that ended since 10m, 2h, 1d ago, or since 2026-01-31T12:00 (local time)",
    )
    parser.add_argument(
        "--command-lines",
        action="store_true",
        help="with the arguments of commands, in which there may be secrets",
    )


def endpoint(given: str | None) -> str:
    """Return where to send to: what is given, or what the environment names.

    Raises:
        InvalidIntent: it is no address of HTTP, or would be sent in the clear to another machine.
    """
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    found = given or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    found = found or (f"{base.rstrip('/')}/v1/traces" if base else ENDPOINT)
    try:
        parts = urlsplit(found)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    allowed = "https://HOST/..., or http:// to 127.0.0.1, [::1] or localhost"
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and _is_here(host))):
        sentence = f"endpoint: {found!r} cannot be used: allowed is {allowed}"
        raise errors.InvalidIntent(sentence, field="endpoint", value=found, allowed=allowed)
    return found


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def run_otel(args: argparse.Namespace) -> int:
    """Send spans until ^C; returns the exit code.

    Raises:
        PermissionDenied: the admin socket is not for this user.
        InvalidIntent: the endpoint cannot be used.
        ImportError: the extra is not installed.
    """
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from agentcgroup.otel.follow import Follower
    from agentcgroup.otel.sending import Sender

    where = endpoint(args.endpoint)
    common.admin().close()
    session = requests.Session()
    # A proxy of the environment is not on the way to this machine.
    session.trust_env = where.startswith("https:")
    sender = Sender(OTLPSpanExporter(endpoint=where, timeout=TIMEOUT_S, session=session))
    since = args.since / 1e6 or time.time()
    follower = Follower(common.admin, sender, since=since, command_lines=args.command_lines)
    said = _Said(args.json)
    # So that a service manager's stop sends what is left, as ^C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.json:
        say(f"Spans go to {where}. ^C ends it.", flush=True)
    try:
        follower.run(lambda: said.tell(sender.counts()))
    except KeyboardInterrupt:
        pass
    finally:
        follower.close()
        said.end(sender.close())
    return common.OK


class _Said:
    """Tells what became of spans: as data each time, in words where some were lost anew."""

    def __init__(self, is_json: bool) -> None:
        self._is_json, self._lost = is_json, 0

    def tell(self, counts: Counts) -> None:
        if self._is_json:
            print_json_line(counts.to_dict())
            return
        lost = counts.lost_full + counts.lost_refused
        if lost > self._lost:
            complain(f"agentcg otel: {_words(counts)}")
        self._lost = lost

    def end(self, counts: Counts) -> None:
        if self._is_json:
            print_json_line(counts.to_dict())
        else:
            say(_words(counts))


def _words(counts: Counts) -> str:
    lost = counts.lost_full + counts.lost_refused
    why = f" ({counts.lost_refused} not taken by the receiver)" if counts.lost_refused else ""
    return f"{counts.sent} spans sent, {lost} lost{why}"
