"""Where a container's cgroup is."""

from __future__ import annotations

from agentcgroupd.host.proc import CgroupUnknown, cgroup_of
from agentcgroupd.runtime.labels import Container

PODMANS_LEAF = "container"
"""Name of the cgroup in which podman puts a container's processes, below the one with its id."""


class NoPlace(Exception):
    """A container's cgroup cannot be told; the text is a clause."""


class HasEnded(Exception):
    """A container has no process any more."""


def cgroup_of_container(container: Container) -> str:
    """The path of a container's cgroup below the cgroup2 mount, whether or not it has been split.

    It is where the container's first process is, up to the name that has the container's id: no
    pattern of paths is known to hold for all runtimes and their options. A number that has come to
    another process meanwhile is not taken for the container's. Raises NoPlace or HasEnded.
    """
    path = container.cgroup
    if not path:
        try:
            path = cgroup_of(container.pid)
        except (FileNotFoundError, ProcessLookupError):
            raise HasEnded from None
        except CgroupUnknown as error:
            raise NoPlace(str(error)) from None
    names = path.split("/")
    with_id = [place for place, name in enumerate(names) if container.id and container.id in name]
    if ".." in names:
        raise NoPlace(f"{path} is no path of a cgroup")
    if not with_id:
        raise NoPlace(f"its process {container.pid} is in {path}, which does not have its id")
    # The first: a container that may make cgroups can make others of that name below.
    end = with_id[0] + 1
    if names[end : end + 1] == [PODMANS_LEAF]:
        end += 1
    return "/".join(names[:end])


def cgroup_of_oci_path(path: str) -> str:
    """The path of a cgroup below the mount from what an OCI runtime is given for it: a path, or
    `SLICE:PREFIX:NAME` where systemd makes it (a slice lies below those that its name begins with,
    systemd.slice(5))."""
    parts = path.split(":")
    if len(parts) != 3 or path.startswith("/"):
        return path
    slice_name, prefix, name = parts
    begun, slices = "", ""
    for part in slice_name.removesuffix(".slice").split("-"):
        if part:
            begun = f"{begun}-{part}" if begun else part
            slices += f"/{begun}.slice"
    return f"{slices}/{prefix}-{name}.scope" if prefix else f"{slices}/{name}"
