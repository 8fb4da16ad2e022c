"""Paste the commands of README.md, one by one, on a fresh Debian.

    python -m tools.try_readme [--suite trixie|bookworm] [--root DIR]

The suite is Debian 13's unless another is named; bookworm is Debian 12. Its root is made by
mmdebstrap, with what a small server has: sudo and systemd. The commands under "Install" are run in
it, with this machine's network, up to the one that needs a running systemd. That one, and those
under "In 60 seconds", are run in the test guest, which boots from the same root with a kernel of
its own; `agentcg uninstall` comes last. Needs root, Debian's archive and PyPI, and some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools import check_wheel
from tools.build_image import SUITE
from tools.debian_suites import SuiteError, find_mirror

ROOT = Path(__file__).resolve().parents[1]
HAS = ("ca-certificates", "dbus", "procps", "sudo", "systemd", "systemd-sysv")
INSIDE = "/usr/src/agentcgroup"
"""Where the checkout is, in the fresh root."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TOLD = ("timeout", "oom_call", "ok")
"""Verdicts of the three calls of the tour."""
GUEST_MIB, GUEST_TIMEOUT_S = 2048, 3600
_ENTER = """set -e
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount -t tmpfs tmp "$1/tmp"
cd "$1"
exec chroot . /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \\
	PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -exc "$2"
"""
_SLOW = "/etc/systemd/system/agentcgroupd.service.d"


class ReadmeError(Exception):
    """A command of the README failed, or what it needs is not here."""


def block(text: str, heading: str) -> str:
    """Return the first block of code under a heading of the README. Raises ReadmeError."""
    pattern = rf"^## {re.escape(heading)}\n(?:(?!^## ).*\n)*?^```\w*\n((?:(?!^```).*\n)*)"
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ReadmeError(f"README.md has no code under {heading!r}")
    return found[1]


def commands(text: str) -> list[str]:
    """Return the commands of a block; one may have several lines, as long as a quote is open."""
    found: list[str] = []
    pending = ""
    for line in text.splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote that is closed further down
            continue
        if words:
            found.append(pending.rstrip("\n"))
        pending = ""
    if pending:
        raise ReadmeError(f"a quote is never closed: {pending!r}")
    return found


def unattended(command: str) -> str:
    """Return a command that asks nothing, as it is answered with yes by hand."""
    return command.replace("apt-get install ", "apt-get install -y ", 1)


def make_root(suite: str, target: Path) -> None:
    """Make a fresh Debian with this checkout in it. Raises ReadmeError, SuiteError."""
    if shutil.which("mmdebstrap") is None:
        raise ReadmeError("mmdebstrap is not here; try: apt-get install mmdebstrap")
    mirror = find_mirror().uris.split()[0]
    options = ["--quiet", "--variant=minbase", f"--include={','.join(HAS)}"]
    _check(["mmdebstrap", *options, suite, str(target), mirror])
    checkout = check_wheel.copy_checkout(target / INSIDE.lstrip("/"))
    shutil.rmtree(checkout / "build", ignore_errors=True)
    # The network is this machine's, and so is whom it trusts.
    for path in (CERTIFICATES, Path("/etc/resolv.conf")):
        if path.exists():
            shutil.copyfile(path, target / path.relative_to("/"))
    names = f"127.0.0.1 localhost {os.uname().nodename} agentcg-guest\n"
    (target / "etc/hosts").write_text(names, encoding="utf-8")


def install(root: Path, pasted: Sequence[str]) -> None:
    """Run commands in the root, in the checkout. Raises ReadmeError."""
    trust = f'export PIP_CERT={CERTIFICATES}\nsudo() {{ command sudo -E "$@"; }}\n'
    script = f"{trust}cd {INSIDE}\napt-get -q update\n" + "\n".join(map(unattended, pasted))
    _check(["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(root), script])


def in_guest(root: Path, pasted: Sequence[str], tour: Sequence[str]) -> None:
    """Run the rest in the guest, with systemd as PID 1 and the root as its own. Raises
    ReadmeError."""
    lines = [
        "set -ex",
        f"cd {INSIDE}",
        f"mkdir -p {_SLOW}",  # an emulated CPU takes its time
        f"printf '[Service]\\nTimeoutStartSec=1200\\nWatchdogSec=0\\n' >{_SLOW}/slow.conf",
        *pasted,
        "systemctl is-active agentcgroupd.service",
        *tour,
        *(f"sudo agentcg history --session demo | grep -q ' {verdict} '" for verdict in TOLD),
        "sudo agentcg uninstall",
        "! test -e /etc/agentcgroup -o -e /usr/local/bin/agentcg",
        "! systemctl is-active agentcgroupd.service",
    ]
    (root / "root/tour.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
    guest = [sys.executable, "-m", "tests.guest.vm", "--systemd", "--root", str(root)]
    guest += ["--memory", str(GUEST_MIB), "--timeout", str(GUEST_TIMEOUT_S)]
    _check([*guest, "--", "sh", "/root/tour.sh"])


def _check(argv: Sequence[str]) -> None:
    print("+", *argv[:1], argv[-1].partition("\n")[0], file=sys.stderr, flush=True)
    status = subprocess.run(argv, cwd=ROOT, check=False).returncode
    if status:
        raise ReadmeError(f"{argv[0]} ended with {status}")


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="agentcgroup-readme-", dir="/var/tmp") as made:
        yield Path(made) / "debian"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.try_readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    which = f"a suite of Debian (default: {SUITE})"
    parser.add_argument("--suite", default=SUITE, metavar="NAME", help=which)
    keep = "where the root is made, and stays; one that is there is used as it is"
    parser.add_argument("--root", type=Path, metavar="DIR", help=keep)
    arguments = parser.parse_args(argv)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    *first, starts = commands(block(readme, "Install"))
    tour = commands(block(readme, "In 60 seconds"))
    try:
        with _directory(arguments.root) as root:
            if not (root / "etc/debian_version").exists():
                make_root(arguments.suite, root)
                install(root, first)
            in_guest(root, [starts], tour)
    except (ReadmeError, SuiteError) as error:
        print(f"try_readme: {error}", file=sys.stderr)
        return 1
    print("every command of the README did what it says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
