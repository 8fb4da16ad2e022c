"""After a restart: sessions, their calls and their reports, as an earlier daemon left them."""

from __future__ import annotations

import logging

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.errors import KnobError
from agentcgroupd.policy.learning import Peaks, learn
from agentcgroupd.sessions.lifecycle import SessionLifecycle
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.records import read_record
from agentcgroupd.state.session import Call
from agentcgroupd.telemetry.audit import Audit

log = logging.getLogger(__name__)


def restore(
    lifecycle: SessionLifecycle, sessions: Sessions, calls: Calls, audit: Audit, peaks: Peaks
) -> None:
    """Take up what the cgroups and the audit log tell; each session before its calls."""
    for session in lifecycle.restore():
        for name in session.cgroup.children():
            cgroup = session.cgroup.child(name)
            data = read_record(cgroup.get_xattr(), "call")
            if data is None:
                continue
            try:
                calls.restore(session, Call.from_record(session, cgroup, data))
            except (KeyError, TypeError, ValueError, KnobError, OSError) as error:
                log.error("%s cannot be taken up: %s", cgroup.path, error)
    if not sessions.open:
        return
    for session_id, reports in _reports(sessions, calls, audit).items():
        session = sessions.open[session_id]
        mine = [r for r in reports.values() if r.began_unix_usec >= session.opened_unix_usec]
        session.reports.extendleft(reversed(mine[-(session.reports.maxlen or 0) :]))
        session.calls_ended += len(mine)
        for report in mine:
            learn(session.learned, peaks, report)
    log.info("took up %d sessions and %d calls", len(sessions.open), len(calls.open))


def _reports(sessions: Sessions, calls: Calls, audit: Audit) -> dict[str, dict[str, pb.Report]]:
    """Reports of ended calls of open sessions, by session and call, oldest first; of two entries
    for a call the later one counts."""
    ended = {r.call_id for s in sessions.open.values() for r in s.reports}
    found: dict[str, dict[str, pb.Report]] = {}
    for report in audit.ended_reports():
        known = report.call_id in ended or report.call_id in calls.open
        if report.session_id in sessions.open and not known:
            found.setdefault(report.session_id, {})[report.call_id] = report
    return found
