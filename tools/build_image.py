"""Build a container image of the daemon, without a container engine.

    python -m tools.build_image [--deb PACKAGE] [--out build/image]

A Debian root is made by mmdebstrap, with the Debian package in it, and becomes the one layer of an
image that is both an OCI layout and what `docker load` reads. Needs root, and Debian's archive.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tools import build_deb
from tools.build_deb import ARCHITECTURES, ROOT, DebError
from tools.debian_suites import SuiteError, find_mirror

SUITE, PYTHON = "trixie", "3.13"
NAME = "agentcgroup"
DROPPED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
KEPT = ("/usr/share/doc/*/copyright",)


def make_root(package: Path, target: Path) -> None:
    """Write the tar of a Debian root with the package in it. Raises DebError, SuiteError."""
    if shutil.which("mmdebstrap") is None:
        raise DebError("mmdebstrap is not here; try: apt-get install mmdebstrap")
    paths = [f"--dpkgopt=path-exclude={pattern}" for pattern in DROPPED]
    paths += [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
    inside = "/var/cache/agentcgroup.deb"
    hooks = [
        f"--customize-hook=upload {package} {inside}",
        f'--customize-hook=chroot "$1" dpkg -i {inside}',
        f'--customize-hook=rm "$1{inside}"',
    ]
    build_deb.run(
        *("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3"),
        *(*paths, *hooks, SUITE, str(target), find_mirror().uris.split()[0]),
    )


class Archive:
    """An image as one tar: blobs by their digest, and the two indexes that point to them."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        """Add a blob; returns its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        self.file(f"blobs/sha256/{digest}", data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def file(self, name: str, data: bytes) -> None:
        """Add a file."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def config_of(version: str, layer_digest: str) -> dict[str, Any]:
    """The image's configuration: what runs, and what its one layer is."""
    return {
        "architecture": ARCHITECTURES[os.uname().machine],
        "os": "linux",
        "config": {
            "Entrypoint": ["/usr/sbin/agentcgroupd"],
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": {
                "org.opencontainers.image.title": NAME,
                "org.opencontainers.image.version": version,
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{"created_by": f"mmdebstrap {SUITE}, {NAME} {version}"}],
    }


def write_image(root_tar: Path, version: str, target: Path) -> None:
    """Make the image of a root's tar."""
    plain = root_tar.read_bytes()
    vendor = "application/vnd.oci.image"
    with Archive(target) as archive:
        layer = archive.blob(gzip.compress(plain, 6, mtime=0), f"{vendor}.layer.v1.tar+gzip")
        text = config_of(version, hashlib.sha256(plain).hexdigest())
        config = archive.blob(_json(text), f"{vendor}.config.v1+json")
        manifest = archive.blob(
            _json(
                {
                    "schemaVersion": 2,
                    "mediaType": f"{vendor}.manifest.v1+json",
                    "config": config,
                    "layers": [layer],
                }
            ),
            f"{vendor}.manifest.v1+json",
        )
        tag = f"{NAME}:{version}"
        manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
        archive.file("index.json", _json({"schemaVersion": 2, "manifests": [manifest]}))
        archive.file("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        blobs = [f"blobs/{one['digest'].replace(':', '/')}" for one in (config, layer)]
        docker = [{"Config": blobs[0], "RepoTags": [tag], "Layers": blobs[1:]}]
        archive.file("manifest.json", _json(docker))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def build(package: Path, out: Path) -> Path:
    """Build the image of a package; returns its path. Raises DebError, SuiteError."""
    version = package.name.split("_")[1]
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{NAME}-{version}-{ARCHITECTURES[os.uname().machine]}.tar"
    with tempfile.TemporaryDirectory(prefix="agentcgroup-image-") as work:
        root_tar, whole = Path(work) / "root.tar", Path(work) / "image.tar"
        make_root(package, root_tar)
        write_image(root_tar, version, whole)
        shutil.move(whole, target)
    return target


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.build_image", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--deb", type=Path, help="one for Debian 13 (else built)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/image", metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="agentcgroup-wheel-") as name:
            work = Path(name)
            package = arguments.deb or build_deb.build(
                build_deb.portable_wheel(work), PYTHON, work / "deb"
            )
            print(build(package, arguments.out))
    except (DebError, SuiteError) as error:
        print(f"build_image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
