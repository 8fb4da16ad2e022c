"""Network traffic of sessions and calls, and what calls may send, where the programs that count it
work."""

from __future__ import annotations

import logging
from functools import partial

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf.net import NetPrograms
from agentcgroupd.errors import BpfError
from agentcgroupd.intents.grant import Grant
from agentcgroupd.state.session import Call, Session
from agentcgroupd.units import CgroupId

log = logging.getLogger(__name__)


class Traffic:
    """Has sessions and calls counted from their beginning to their end.

    Counts begin with the programs: of a call that an earlier daemon left, nothing is told, because
    it would be less than there was.
    """

    def __init__(self, programs: NetPrograms) -> None:
        self._programs = programs

    def session_opened(self, session: Session) -> None:
        """Count for a session; an adopted one lies outside of the pool. Raises BpfError."""
        if session.adopted:
            self._programs.attach(session.cgroup)
        self._programs.look_from(session.cgroup_path.count("/"))
        self._programs.follow(session.cgroup.id)
        session.traffic = partial(self._of, session.cgroup.id)

    def session_closed(self, session: Session) -> None:
        """Count for it no more. Raises BpfError."""
        session.traffic = None
        self._programs.detach(session.cgroup.id)
        self._programs.forget(session.cgroup.id)

    def call_opened(self, call: Call) -> None:
        """Count for a call that has just been made, and hold any to what it may send; nothing where
        its session is not counted. Raises BpfError."""
        if call.session.traffic is None or (
            call.entered and call.grant.net_send_bytes_per_s is None
        ):
            return
        self._programs.follow(call.cgroup.id, call.grant.net_send_bytes_per_s)
        if not call.entered:
            call.traffic = partial(self._of, call.cgroup.id)

    def regrant(self, call: Call, grant: Grant) -> None:
        """Hold a call to what it may send by its new grant. Raises BpfError."""
        if call.session.traffic is None:
            return
        if grant.net_send_bytes_per_s != call.grant.net_send_bytes_per_s:
            self._programs.limit(call.cgroup.id, grant.net_send_bytes_per_s)

    def call_closed(self, call: Call) -> None:
        """Count for it no more. Raises BpfError."""
        call.traffic = None
        self._programs.forget(call.cgroup.id)

    def _of(self, cgroup: CgroupId) -> pb.NetUsage | None:
        """Read what was counted; None: that cannot be read."""
        try:
            found = self._programs.of(cgroup)
        except BpfError as error:
            log.warning("traffic of cgroup %d: %s", cgroup, error)
            return None
        if found is None:
            return None
        return pb.NetUsage(
            receive_bytes=found.receive_bytes,
            receive_packets=found.receive_packets,
            send_bytes=found.send_bytes,
            send_packets=found.send_packets,
            refused_packets=found.refused_packets,
        )
