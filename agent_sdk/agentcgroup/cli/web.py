"""`web`: what `top` shows, and a timeline, on a page for a browser of this machine."""

from __future__ import annotations

import argparse
import re
import secrets
import time
from contextlib import closing
from ipaddress import ip_address

from agentcgroup import errors
from agentcgroup.admin import Admin

from . import common
from .output import print_json, say
from .summaries import summary
from .top import FIRST_S

ADDRESS = "127.0.0.1:9470"
MINUTES, MINUTES_MOST = 30, 240


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's command."""
    parser = common.command(subparsers, "web", run_web, summary("web"))
    parser.add_argument(
        "--address",
        type=_address,
        metavar="ADDRESS:PORT",
        default=ADDRESS,
        help=f"where to listen, on loopback; port 0: any that is free (default: {ADDRESS})",
    )
    parser.add_argument(
        "--allow-host",
        type=_host,
        action="append",
        metavar="NAME",
        default=[],
        help="a name by which a proxy of yours passes requests on, beside localhost",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="N",
        default=MINUTES,
        help=f"how much of the past is kept, at most {MINUTES_MOST} (default: {MINUTES})",
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        address = None
    if address is None or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no ADDRESS:PORT such as {ADDRESS}")
    if not address.is_loopback:
        sentence = "is not on loopback; reach it from elsewhere by 'ssh -L 9470:127.0.0.1:9470'"
        raise argparse.ArgumentTypeError(f"{text!r} {sentence}")
    return str(address), int(port)


def _host(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z._-]{1,253}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a host, without a port")
    return text.lower()


def _minutes(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII) or not 1 <= int(text) <= MINUTES_MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of minutes from 1 to {MINUTES_MOST}"
        )
    return int(text)


def run_web(args: argparse.Namespace) -> int:
    """Serve the page until ^C or, with --json, print once what it would show. Returns the exit
    code.

    Raises:
        PermissionDenied: the admin socket is not for this user.
        OSError: the address cannot be used.
    """
    from agentcgroup.web.server import LOOPBACK_NAMES, Server, Site
    from agentcgroup.web.watch import Watch

    # A daemon that is away may come; one that must not be asked is better told of now.
    with common.admin() as admin:
        is_there = _answers(admin)
    watch = Watch(common.admin, args.minutes)
    if args.json:
        watch.look_once()
        time.sleep(FIRST_S)
        watch.look_once()
        print_json({**watch.now(), "timeline": watch.timeline(args.minutes)})
        return common.OK
    token = secrets.token_urlsafe(32)
    site = Site(watch, token, LOOPBACK_NAMES | frozenset(args.allow_host))
    try:
        server = Server(args.address, site)
    except OSError as error:
        where = "{}:{}".format(*args.address)
        raise errors.AgentcgError(f"--address: {where} cannot be used: {error.strerror}") from None
    with server, closing(watch):
        watch.start()
        say(f"http://{_shown(server.server_name, server.server_port)}/#token={token}")
        say("Open this address in a browser. Whoever has it sees all sessions. ^C ends it.")
        if not is_there:
            say("The daemon does not answer; the page says so until it does.")
        say(end="", flush=True)
        server.serve_forever()
    return common.OK


def _answers(admin: Admin) -> bool:
    try:
        admin.pool()
    except errors.Unavailable:
        return False
    return True


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
