"""What a call did with block devices, from io.stat of its cgroup."""

from __future__ import annotations

from collections.abc import Mapping

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.host.block_devices import device_name

DEVICES_MOST = 8


def devices_of(stat: Mapping[str, Mapping[str, int]]) -> tuple[pb.DeviceIo, ...]:
    """Give what was read from and written to each device, the busiest first, at most
    DEVICES_MOST. `stat`: by the device's numbers."""
    found = [
        pb.DeviceIo(
            device=number,
            read_bytes=counts.get("rbytes", 0),
            write_bytes=counts.get("wbytes", 0),
            reads=counts.get("rios", 0),
            writes=counts.get("wios", 0),
        )
        for number, counts in stat.items()
    ]
    used = [each for each in found if each.read_bytes or each.write_bytes]
    used.sort(key=lambda each: -(each.read_bytes + each.write_bytes))
    for each in used[:DEVICES_MOST]:
        each.device = device_name(each.device)
    return tuple(used[:DEVICES_MOST])
