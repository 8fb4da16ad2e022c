"""The portable wheel, the Debian package and the container image.

What is slow, and needs Debian's archive and PyPI, is done where AGENTCG_PACKAGES=1 is set: the
package is built, installed in a clean Debian 13 root, tried, and purged.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import build_deb, build_image, check_wheel, manylinux

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = pytest.mark.skipif(
    os.environ.get("AGENTCG_PACKAGES") != "1" or shutil.which("mmdebstrap") is None,
    reason="set AGENTCG_PACKAGES=1 and install mmdebstrap: it takes minutes, and Debian's archive",
)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel for any Linux."""
    work = tmp_path_factory.mktemp("portable")
    tree = check_wheel.copy_checkout(work / "tree", compiled=True)
    return manylinux.repair(check_wheel.build(tree, "wheel"), work / "out")


def test_the_wheel_needs_nothing_of_the_host_but_its_c_library(
    portable: Path, tmp_path: Path
) -> None:
    assert manylinux.glibc_of(portable.name) <= manylinux.GLIBC_MOST
    with zipfile.ZipFile(portable) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    (libelf,) = (tmp_path / "agentcgroup.libs").glob("libelf*.so")
    library = tmp_path / "agentcgroupd/bpf/lib/libbpf.so.1"
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert str(libelf) in needed.replace("/agentcgroupd/bpf/lib/../../..", "")
    share = "agentcgroup-0.1.0.data/data/share/agentcgroup"
    for kind, source in (("systemd", "systemd"), ("recordings", "bench/recordings")):
        assert {f"{share}/{kind}/{path.name}" for path in (ROOT / source).iterdir()} <= {*names}


def test_a_wheel_for_no_c_library_in_particular() -> None:
    with pytest.raises(manylinux.ManylinuxError, match="no C library"):
        manylinux.glibc_of("agentcgroup-0.1.0-py3-none-linux_x86_64.whl")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "agentcgroup-0.1.0-py3-none-linux_x86_64.whl"
    broken.write_bytes(b"")
    with pytest.raises(manylinux.ManylinuxError, match="auditwheel"):
        manylinux.repair(broken, tmp_path / "out")


def test_versions_are_those_of_the_lock() -> None:
    lock = (
        "a-b==1.2 \\\n    --hash=sha256:0\nc==3 ; python_full_version < '3.12' \\\n    --hash=x\n"
    )
    assert build_deb.locked_versions(lock) == ["a-b==1.2", "c==3 ; python_full_version < '3.12'"]
    found = build_deb.locked_versions((ROOT / "requirements.lock").read_text())
    assert any(line.startswith("grpcio==") for line in found)


def test_the_package_s_units_name_its_own_programs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "systemd", tmp_path / build_deb.HOME / "share/agentcgroup/systemd")
    build_deb.lay_out_service(tmp_path)
    unit = (tmp_path / "usr/lib/systemd/system/agentcgroupd.service").read_text()
    assert "ExecStart=/usr/lib/agentcgroup/bin/agentcgroupd --config /etc/agentcgroup/" in unit
    assert "ExecStopPost=-/usr/lib/agentcgroup/bin/agentcg-release" in unit
    assert (tmp_path / "etc/agentcgroup/agentcgroupd.toml").is_file()
    assert (tmp_path / "usr/lib/tmpfiles.d/agentcgroup.conf").is_file()


def test_the_package_depends_on_one_python(tmp_path: Path) -> None:
    build_deb.control(tmp_path, "1.2", "3.13", "x86_64")
    text = (tmp_path / "DEBIAN/control").read_text()
    assert "Depends: python3 (>= 3.13), python3 (<< 3.14), libc6 (>= 2.34)" in text
    for name in ("postinst", "prerm", "postrm"):
        script = tmp_path / "DEBIAN" / name
        assert script.stat().st_mode & 0o777 == 0o755
        subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize(
    ("asked", "python", "refused", "status", "called"),
    [
        ("remove", True, False, 0, ["agentcg-cli uninstall --docker", "systemctl disable"]),
        ("remove", True, True, 1, ["agentcg-cli uninstall --docker"]),
        ("remove", False, True, 0, ["systemctl disable"]),
        ("upgrade", True, True, 0, []),
    ],
    ids=["removed", "containers have the runtime", "no Python any more", "upgraded"],
)
def test_docker_forgets_the_runtime_before_the_package_goes(
    tmp_path: Path, asked: str, python: bool, refused: bool, status: int, called: list[str]
) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    (home / "bin").mkdir(parents=True)
    text = build_deb.PRERM.replace("/usr/lib/agentcgroup", str(home))
    (tmp_path / "prerm").write_text(text.replace("/run/systemd/system", "/nonexistent"))
    programs = {
        "systemctl": f'echo systemctl "$1" >> {log}',
        "home/bin/python": f"exit {0 if python else 127}",
        "home/bin/agentcg-cli": f"echo agentcg-cli $* >> {log}; exit {3 if refused else 0}",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", tmp_path / "prerm", asked], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, log.read_text().splitlines() if log.exists() else []) == (
        status,
        called,
    )
    assert ("stays as it is" in done.stderr) is (status == 1)


@pytest.mark.parametrize("python", [True, False], ids=["with Python", "without"])
def test_what_is_adopted_is_given_back_before_the_package_stops_its_daemon(
    tmp_path: Path, python: bool
) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    (home / "bin").mkdir(parents=True)
    text = build_deb.PRERM.replace("/usr/lib/agentcgroup", str(home))
    (tmp_path / "prerm").write_text(text.replace("/run/systemd/system", str(tmp_path)))
    says = f'echo "${{3##*; }}" >> {log}'
    programs = {
        "systemctl": f'echo systemctl "$1" "$2" >> {log}',
        "home/bin/python": f'[ -z "$3" ] || {says}' if python else "exit 127",
        "home/bin/agentcg-cli": "exit 0",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", tmp_path / "prerm", "remove"], env=env, capture_output=True, text=True, check=False
    )
    called = log.read_text().splitlines()
    stops = ["systemctl stop agentcgroupd-agent.socket", "systemctl stop agentcg-pool.service"]
    wanted = ["give_back_or_say()", stops[0], "say_what_stays()", stops[1]] if python else stops
    assert (done.returncode, called[: len(wanted)]) == (0, wanted)
    assert ("may stay split" in done.stderr) is not python


def test_the_package_s_scripts_call_what_there_is() -> None:
    lines = re.findall(r'"(from agentcgroup\.[^";]+import [^";]+)', build_deb.PRERM)
    assert len(lines) == 2
    for line in lines:
        subprocess.run([sys.executable, "-I", "-c", line], check=True)


def test_an_image_is_what_its_digests_say(tmp_path: Path) -> None:
    root = tmp_path / "root.tar"
    with tarfile.open(root, "w") as tar:
        member = tarfile.TarInfo("etc/hostname")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"box"))
    build_image.write_image(root, "1.2", tmp_path / "image.tar")
    _check_image(tmp_path / "image.tar", "agentcgroup:1.2")


def _check_image(image: Path, tag: str) -> None:
    with tarfile.open(image) as tar:
        files = {name: tar.extractfile(name) for name in tar.getnames()}
        held = {name: stream.read() for name, stream in files.items() if stream is not None}
    for name, data in held.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"
    (docker,) = json.loads(held["manifest.json"])
    (manifest,) = json.loads(held["index.json"])["manifests"]
    inner = json.loads(held["blobs/" + manifest["digest"].replace(":", "/")])
    config = json.loads(held[docker["Config"]])
    (layer,) = docker["Layers"]
    plain = gzip.decompress(held[layer])
    assert docker["RepoTags"] == [tag]
    assert inner["config"]["digest"].endswith(docker["Config"].rpartition("/")[2])
    assert inner["layers"][0]["digest"].endswith(layer.rpartition("/")[2])
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(plain).hexdigest()}"]
    assert config["config"]["Entrypoint"] == ["/usr/sbin/agentcgroupd"]


_ENTER = """
set -e
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mkdir -p "$1/sys/fs/cgroup"
mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
exec chroot "$1" sh -c "$2"
"""
_IN_ROOT = """
set -e
agentcg version
agentcg policy check default
agentcgroupd --check >/dev/null
agentcg exec --on-unavailable run -- echo ran
! agentcg install
agentcg install --docker
grep -q '"path": "/usr/lib/agentcgroup/bin/agentcg-runtime"' /etc/docker/daemon.json
printf '#!/bin/sh\\n[ "$2" = ls ] && echo id || echo agentcg /agent\\n' > /usr/bin/docker
chmod 755 /usr/bin/docker
if dpkg -r agentcgroup; then exit 1; fi
test -x /usr/lib/agentcgroup/bin/agentcg-runtime -a -e /etc/docker/daemon.json
agentcg version
rm /usr/bin/docker
dpkg -r agentcgroup >/dev/null
test ! -e /usr/lib/agentcgroup -a -e /etc/agentcgroup/agentcgroupd.toml
test ! -e /etc/docker/daemon.json
mkdir -p /var/lib/agentcgroup
dpkg -P agentcgroup >/dev/null
test ! -e /etc/agentcgroup -a ! -e /var/lib/agentcgroup
"""


@PACKAGES
@pytest.mark.timeout(1200)
def test_the_package_in_a_clean_debian_and_in_an_image(portable: Path, tmp_path: Path) -> None:
    package = build_deb.build(portable, "3.13", tmp_path)
    image = build_image.build(package, tmp_path / "image")
    version = portable.name.split("-")[1]
    _check_image(image, f"agentcgroup:{version}")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(image) as tar:
        (docker,) = json.loads(_read(tar, "manifest.json"))
        layer = tmp_path / "layer.tar"
        layer.write_bytes(gzip.decompress(_read(tar, docker["Layers"][0])))
    subprocess.run(["tar", "-xf", layer, "-C", root, "--exclude=./dev/*"], check=True)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _ENTER, "sh", root, _IN_ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert version in done.stdout and "policy default: ok" in done.stdout
    assert "systemctl enable --now agentcgroupd" in done.stderr
    assert "containers have Docker's runtime agentcg: agent; remove them first" in done.stderr


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    assert stream is not None
    return stream.read()
