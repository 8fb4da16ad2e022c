"""`agentcgroupd`: run the daemon."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys

# grpc writes to standard error what peers say when they hang up, byte for byte. Of what it says
# nothing is needed: errors come as exceptions. It reads this when it is loaded, which is below.
os.environ["GRPC_VERBOSITY"] = "NONE"

from agentcgroup import __version__
from agentcgroup.cli import BROKEN_PIPE, INTERRUPTED
from agentcgroup.cli.output import OutputError, complain, flush, give_up_stdout, say
from agentcgroup.extras import missing

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: trying again will not help."""

STOP_ALL_S = 9.0
"""How long a stop may take; the process then ends itself, with status 1, and says where it was."""

try:
    from agentcgroupd.arguments import make_parser
    from agentcgroupd.check import check
    from agentcgroupd.config import load_config
    from agentcgroupd.daemon import Daemon
    from agentcgroupd.errors import AgentcgroupdError
    from agentcgroupd.host.namespace import enter_host_cgroup_namespace
    from agentcgroupd.running import PartFailed
    from agentcgroupd.settings import show
    from agentcgroupd.telemetry.logs import set_up
except ImportError as error:
    extra = missing(error)
    if extra is None:
        raise
    print(f"agentcgroupd: {extra}", file=sys.stderr)
    sys.exit(EXIT_CONFIG)

log = logging.getLogger("agentcgroupd")


def _stop_in_time() -> None:
    """Make sure that the process is gone in time whatever does not end: first everything that is
    held back is let go of, and then there is little worth waiting for."""
    try:
        faulthandler.dump_traceback_later(STOP_ALL_S, exit=True)
    except RuntimeError as error:
        # It needs a thread; the kernel's own timer needs none, but cannot say where the end was.
        log.warning("%s; an alarm ends this process if it does not stop", error)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, STOP_ALL_S)


def main() -> int:
    """Run the command line; returns the exit status. What it prints is written, or it is told that
    it could not be."""
    try:
        status = _run()
        flush()
        return status
    except OutputError as error:
        give_up_stdout()
        if error.is_reader_gone:
            return BROKEN_PIPE
        complain(f"agentcgroupd: the output cannot be written: {error}")
        return 1
    except KeyboardInterrupt:  # before there is a daemon that stops for it
        return INTERRUPTED


def _run() -> int:
    """Parse, run, and turn what is known to go wrong into one line and an exit status."""
    arguments = make_parser(__version__).parse_args()
    set_up(arguments.verbose)
    try:
        config = load_config(arguments.config)
        if arguments.check:
            check(config)
            say(show(arguments.config), end="")
            return 0
        if os.geteuid() != 0:
            log.error("it makes cgroups and moves processes, as root; try: sudo agentcgroupd")
            return 1
        enter_host_cgroup_namespace()
        asyncio.run(Daemon(config, _stop_in_time).run())
        log.info("stopped; sessions and calls stay for the next daemon")
        return 0
    except PartFailed as error:
        log.error("%s", error)
        return 1
    except AgentcgroupdError as error:
        for line in str(error).split("\n"):
            log.error("%s", line)
        return EXIT_CONFIG
    except OSError as error:
        log.error("cannot start: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
