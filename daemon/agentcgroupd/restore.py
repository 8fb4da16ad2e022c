"""After a restart: sessions, their calls and their reports, as an earlier daemon left them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.lifecycle import Calls
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import KnobError
from agentcgroupd.policy.learning import Peaks, learn
from agentcgroupd.sessions.lifecycle import SessionLifecycle
from agentcgroupd.sessions.registry import Sessions
from agentcgroupd.state.records import foreign_version, read_record
from agentcgroupd.state.second_records import SecondRecords
from agentcgroupd.state.session import CALL_PREFIX, MAIN_LEAF, Call, Session, unix_usec
from agentcgroupd.telemetry.audit import Audit
from agentcgroupd.telemetry.notices import Notices

log = logging.getLogger(__name__)


def restore(
    lifecycle: SessionLifecycle, sessions: Sessions, calls: Calls, notices: Notices, peaks: Peaks
) -> None:
    """Take up what the cgroups and the audit log tell; each session before its calls."""
    audit = notices.audit
    for session in lifecycle.restore():
        for call in _found_in(session, session.cgroup, None, calls.second):
            try:
                calls.restore(session, call)
            except (KnobError, OSError, ValueError) as error:
                log.error("%s cannot be taken up: %s", call.cgroup.path, error)
    calls.second.drop_all_but(calls.open)
    notices.history.settle(audit.ended_reports, audit.closed_sessions)
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


def _found_in(
    session: Session, above: Cgroup, outer: Call | None, second: SecondRecords
) -> Iterator[Call]:
    """Find calls by the records on their cgroups, directly below another cgroup and inside each
    other, the innermost first: a call ends only after those inside it."""
    for name in list(above.children()):
        try:
            cgroup = above.child(name)
            found = _call_in(session, cgroup, second)
        except (KeyError, TypeError, ValueError, KnobError, OSError) as error:
            log.error("%s/%s cannot be taken up: %s", above.path, name, error)
            continue
        if found is None:
            continue
        call = found
        call.parent = outer
        if outer is not None:
            outer.inner[call.id] = call
        if call.main_leaf is not None:
            yield from _found_in(session, cgroup, call, second)
        yield call


def _call_in(session: Session, cgroup: Cgroup, second: SecondRecords) -> Call | None:
    """Read a call's record: that on its cgroup or, where that is gone or cannot be read, the second
    one, which is then put in its place. None: there is no call. Raises KeyError, TypeError,
    ValueError, KnobError or OSError."""
    raw = cgroup.get_xattr()
    data = read_record(raw, "call")
    try:
        if data is not None:
            return Call.from_record(session, cgroup, data)
    except (KeyError, TypeError, ValueError) as error:
        log.error("the record on %s cannot be read: %s", cgroup.path, error)
    if foreign_version(raw, "call") is not None:
        return None
    kept = second.read(cgroup.path.name.removeprefix(CALL_PREFIX), cgroup.id)
    if kept is None:
        return None
    if not kept["split"] and MAIN_LEAF in set(cgroup.children()):
        kept["split"] = True
    call = Call.from_record(session, cgroup, kept)
    log.warning("the record on %s is gone; the daemon's own copy is put there", cgroup.path)
    what = "its record on its cgroup was gone when a daemon was started; a copy took its place"
    call.account.add(what, second.source, unix_usec())
    cgroup.set_xattr(call.record())
    return call


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
