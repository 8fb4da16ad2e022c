"""Build the Debian package: the wheel and what it needs in an environment of its own.

    python -m tools.build_deb [--python 3.13] [--wheel WHEEL] [--out build/deb]

The environment lies in /usr/lib/agentcgroup and runs by the system's own Python, whose version the
package depends on: 3.13 is Debian 13's, 3.11 Debian 12's, 3.12 Ubuntu 24.04's. gRPC and protobuf
are newer than any distribution's, so they come along. pip fetches them, in the versions of
requirements.lock.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from tools import manylinux

ROOT = Path(__file__).resolve().parents[1]
HOME = Path("usr/lib/agentcgroup")
UNITS = Path("usr/lib/systemd/system")
PROGRAMS = (
    "agentcg",
    "agentcg-exec",
    "agentcg-hook",
    "agentcg-load",
    "agentcg-release",
    "agentcg-runtime",
    "agentcg-sh",
)
SCRIPTS = {
    "agentcg-cli": "from agentcgroup.cli import main",
    "agentcgroupd": "from agentcgroupd.__main__ import main",
}
ON_PATH = {
    "usr/bin": ("agentcg", "agentcg-exec", "agentcg-hook", "agentcg-load", "agentcg-sh"),
    "usr/sbin": ("agentcgroupd",),
}
GLIBC = "2.34"
PLATFORMS = ("manylinux_2_34", "manylinux_2_28", "manylinux_2_17", "manylinux2014")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    /usr/lib/agentcgroup/bin/python -m compileall -q -j 0 /usr/lib/agentcgroup/lib || true
    if [ -d /run/systemd/system ]; then
        systemd-tmpfiles --create agentcgroup.conf
        systemctl daemon-reload
        systemctl enable --quiet agentcgroupd.service
        # Sessions are in a unit of their own and outlive this.
        systemctl restart agentcgroupd.service ||
            echo "agentcgroupd did not start; see: journalctl -u agentcgroupd" >&2
    elif [ -z "$2" ]; then
        # An image: the service starts at its first boot.
        systemctl enable --quiet agentcgroupd.service 2>/dev/null || true
    fi
fi
"""
PRERM = """\
#!/bin/sh
set -e
# Containers whose runtime is gone would not start any more, so this comes first, and may refuse.
# The system's Python may be gone before the package is.
if [ "$1" = remove ] && /usr/lib/agentcgroup/bin/python -I -c '' 2>/dev/null; then
    /usr/lib/agentcgroup/bin/agentcg-cli uninstall --docker >/dev/null || {
        echo "agentcgroup stays as it is, because Docker's configuration names it" >&2
        exit 1
    }
fi
if [ -d /run/systemd/system ] && [ "$1" = remove ]; then
    # What was adopted, cgroups of containers, is given back by the daemon alone, and its marks go
    # with the pool. The package goes all the same, and says what stays.
    import="from agentcgroup.cli.install_sessions import give_back_or_say, say_what_stays"
    /usr/lib/agentcgroup/bin/python -I -c "$import; give_back_or_say()" || true
    systemctl stop agentcgroupd-agent.socket agentcgroupd-admin.socket agentcgroupd.service || true
    /usr/lib/agentcgroup/bin/python -I -c "$import; say_what_stays()" ||
        echo "agentcgroup: containers that were sessions may stay split until they stop" >&2
    systemctl stop agentcg-pool.service agentcg.slice || true
    # What is pinned works on without a daemon; pins of another pool stay.
    unpin="from agentcgroup.cli.install_pins import remove_pins; remove_pins()"
    /usr/lib/agentcgroup/bin/python -I -c "$unpin" || true
fi
if [ "$1" = remove ] && command -v systemctl >/dev/null; then
    systemctl disable --quiet agentcgroupd.service || true
fi
find /usr/lib/agentcgroup -name __pycache__ -type d -prune -exec rm -rf {} +
"""
POSTRM = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
if [ "$1" = remove ]; then rm -rf /run/agentcgroup; fi
if [ "$1" = purge ]; then
    rm -rf /var/log/agentcgroup /var/lib/agentcgroup
    if [ -d /etc/agentcgroup ]; then rmdir --ignore-fail-on-non-empty /etc/agentcgroup; fi
fi
"""


class DebError(Exception):
    """The package cannot be built; the text says why."""


def run(*argv: str) -> str:
    """Run a command and return what it prints. Raises DebError."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DebError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def locked_versions(lock: str) -> list[str]:
    """Read `name==version ; marker` lines, without hashes, from the text of requirements.lock."""
    found = re.findall(r"^([\w.-]+==[^\s\\]+)( ; [^\\\n]+?)? \\$", lock, re.MULTILINE)
    return [name + marker for name, marker in found]


def install_into(site: Path, wheel: Path, python: str, machine: str, work: Path) -> None:
    """Unpack the wheel and what the daemon needs for another Python than this one."""
    constraints = work / "constraints.txt"
    constraints.write_text("\n".join(locked_versions((ROOT / "requirements.lock").read_text())))
    platforms = [f"--platform={name}_{machine}" for name in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    where = [f"--target={site}", f"--python-version={python}", "--implementation=cp"]
    only = ["--only-binary=:all:", "--no-compile", f"--constraint={constraints}"]
    run(*pip, *where, *platforms, *only, f"agentcgroup[daemon] @ {wheel.resolve().as_uri()}")


def lay_out(tree: Path, wheel: Path, python: str, machine: str, work: Path) -> None:
    """Put the files where they are on the target."""
    home = tree / HOME
    site = home / f"lib/python{python}/site-packages"
    site.mkdir(parents=True)
    install_into(site, wheel, python, machine, work)
    binaries = home / "bin"
    binaries.mkdir()
    for name in PROGRAMS:
        shutil.move(site / "bin" / name, binaries / name)
    shutil.rmtree(site / "bin")
    for name, line in SCRIPTS.items():
        text = f"#!/{HOME}/bin/python -I\nimport sys\n{line}\n\nsys.exit(main())\n"
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    # What `python -m venv` makes: a link, and a file beside it.
    (binaries / "python").symlink_to(f"/usr/bin/python{python}")
    (binaries / "python3").symlink_to("python")
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n"
    )
    shutil.move(site / "share", home / "share")
    lay_out_service(tree)
    for directory, names in ON_PATH.items():
        (tree / directory).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tree / directory / name).symlink_to(f"/{HOME}/bin/{name}")
    for name in ("bash-completion/completions", "zsh", "man"):
        source = home / "share" / name
        if source.is_dir():
            shutil.copytree(source, tree / "usr/share" / name)
    documents = tree / "usr/share/doc/agentcgroup"
    documents.mkdir(parents=True)
    for name in ("README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, documents)
    licences = [
        ROOT / "LICENSE",
        ROOT / "bpf/LICENSE",
        site / "agentcgroupd/bpf/lib/LICENSE.libbpf",
    ]
    (documents / "copyright").write_text("\n\n".join(path.read_text() for path in licences))


def lay_out_service(tree: Path) -> None:
    """The units, by the programs' own paths, the configuration, and the directories."""
    source = tree / HOME / "share/agentcgroup/systemd"
    for path in source.iterdir():
        text = path.read_text().replace("/usr/bin/env agentcg", f"/{HOME}/bin/agentcg")
        if path.name == "agentcgroupd.toml":
            target = tree / "etc/agentcgroup" / path.name
        elif path.name == "agentcgroup.tmpfiles.conf":
            target = tree / "usr/lib/tmpfiles.d/agentcgroup.conf"
        else:
            target = tree / UNITS / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def control(tree: Path, version: str, python: str, machine: str) -> None:
    """The package's own description and scripts."""
    following = f"{python.split('.')[0]}.{int(python.split('.')[1]) + 1}"
    size_kib = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file()) // 1024
    directory = tree / "DEBIAN"
    directory.mkdir()
    (directory / "control").write_text(
        textwrap.dedent(f"""\
            Package: agentcgroup
            Version: {version}
            Architecture: {ARCHITECTURES[machine]}
            Maintainer: agentcgroup maintainers <maintainers@localhost>
            Installed-Size: {size_kib}
            Depends: python3 (>= {python}), python3 (<< {following}), libc6 (>= {GLIBC})
            Recommends: systemd
            Section: admin
            Priority: optional
            Description: resource control for AI agents, one tool call at a time
             A daemon that gives each tool call of an AI agent a cgroup of its own, decides by
             policy what happens when memory runs short, and tells agents what was done.
            """)
    )
    (directory / "conffiles").write_text("/etc/agentcgroup/agentcgroupd.toml\n")
    for name, text in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)


def build(wheel: Path, python: str, out: Path) -> Path:
    """Build the package of a portable wheel; returns its path. Raises DebError."""
    machine = os.uname().machine
    version = wheel.name.split("-")[1]
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"agentcgroup_{version}_{ARCHITECTURES[machine]}.deb"
    with tempfile.TemporaryDirectory(prefix="agentcgroup-deb-") as name:
        work, tree = Path(name), Path(name) / "tree"
        tree.mkdir(mode=0o755)
        lay_out(tree, wheel, python, machine, work)
        control(tree, version, python, machine)
        for path in tree.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        run("dpkg-deb", "--build", "--root-owner-group", str(tree), str(target))
    return target


def portable_wheel(work: Path) -> Path:
    """Build the wheel of this checkout, for any Linux. Raises DebError."""
    try:
        return manylinux.build(work)
    except manylinux.ManylinuxError as error:
        raise DebError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.build_deb", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--python", default="3.13", help="the target's (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="one made by tools.manylinux (else built)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/deb", metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="agentcgroup-wheel-") as work:
            wheel = arguments.wheel or portable_wheel(Path(work))
            print(build(wheel, arguments.python, arguments.out))
    except DebError as error:
        print(f"build_deb: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
