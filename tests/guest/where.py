"""Decide where things that need cgroup controllers run: natively, or in the test guest.

    python -m tests.guest.where                     print "native" or "guest"; the reason on stderr
    python -m tests.guest.where [options] -- cmd    run cmd there; the options of tests.guest.vm

$AGENTCG_WHERE=native|guest overrides. Needs only the standard library, because setup asks too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONTROLLERS = frozenset({"memory", "cpu", "pids"})

Kind = Literal["native", "guest"]


@dataclass(frozen=True, slots=True)
class Where:
    """A place to run, and a reason to print."""

    kind: Kind
    reason: str


def decide(
    environ: Mapping[str, str] = os.environ,
    euid: int | None = None,
    mountinfo: str | None = None,
) -> Where:
    """Native where root can use the controllers we need on some cgroup2 mount, else the guest.

    euid, mountinfo: this process's own, unless given. Raises ValueError for a bad override.
    """
    match environ.get("AGENTCG_WHERE", ""):
        case "native":
            return Where("native", "AGENTCG_WHERE says so")
        case "guest":
            return Where("guest", "AGENTCG_WHERE says so")
        case "":
            pass
        case other:
            raise ValueError(f"AGENTCG_WHERE={other!r}: expected native or guest")
    if (os.geteuid() if euid is None else euid) != 0:
        return Where("guest", "not root")
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    mounts = cgroup2_mounts(text)
    if not mounts:
        return Where("guest", "cgroup v2 is not mounted here")
    reasons = []
    for mount in mounts:
        reason = unusable(mount)
        if reason is None:
            return Where("native", f"{mount} has {', '.join(sorted(CONTROLLERS))}")
        reasons.append(reason)
    return Where("guest", "; ".join(reasons))


def cgroup2_mounts(mountinfo: str) -> list[Path]:
    """Mount points of type cgroup2 in proc_pid_mountinfo(5), in order."""
    found = []
    for line in mountinfo.splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.split(" ", 1)[0] == "cgroup2":
            octal = fields.split()[4]
            found.append(Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), octal)))
    return found


def unusable(mount: Path) -> str | None:
    """Why the daemon could not work on this cgroup2 mount; None when it could."""
    try:
        offered = set((mount / "cgroup.controllers").read_text().split())
    except OSError as error:
        return f"{mount}: {error.strerror}"
    if missing := CONTROLLERS - offered:
        return f"{mount} lacks {', '.join(sorted(missing))}"
    if os.statvfs(mount).f_flag & os.ST_RDONLY or not os.access(mount, os.W_OK):
        return f"{mount} is read-only"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the decision, or run a command by it."""
    from tests.guest import vm  # late: the decision alone must not depend on the rest

    given = list(sys.argv[1:] if argv is None else argv)
    where = decide()
    if not given:
        print(where.kind)
        print(where.reason, file=sys.stderr)
        return 0
    arguments = vm.parser("python -m tests.guest.where").parse_args(given)
    print(f"where: {where.kind} ({where.reason})", file=sys.stderr, flush=True)
    if where.kind == "guest":
        return vm.main(given)
    os.execvp(arguments.command[0], arguments.command)


if __name__ == "__main__":
    sys.exit(main())
