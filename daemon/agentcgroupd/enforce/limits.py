"""What a call's leaf is limited to, and which processes go first when memory ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.disk_share import (
    DEFAULT_WEIGHT,
    NO_SUCH_DEVICE,
    write_weight,
)
from agentcgroupd.cgroup.knobs import Knob, T
from agentcgroupd.cgroup.tree import Cgroup
from agentcgroupd.errors import InvalidField, KnobError
from agentcgroupd.host.block_devices import whole_devices
from agentcgroupd.host.proc import read_proc
from agentcgroupd.intents.grant import Grant
from agentcgroupd.intents.parse import CpuList
from agentcgroupd.state.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setting:
    """An interface file that takes a field of the intent as it is (intents.parse.SETTING)."""

    file: str
    controller: str
    """The controller that has the file. Sessions give it to their calls when one asks for it."""
    within: Callable[[Cgroup, str, str], tuple[str, str]]
    """From the cgroup above a call, its name in sentences and the text to what of it that can give,
    and a sentence where that is less. Raises InvalidField where it is nothing, KnobError."""
    lines: Callable[[str], Sequence[str]] = lambda text: (text,)
    """From the text to what is written to the file, one line a write."""


def _cpus_within(above: Cgroup, name: str, text: str) -> tuple[str, str]:
    """Take from the CPUs that are asked for those that may be used above the call."""
    may_use = above.read(CPUSET_EFFECTIVE)
    given = str(CpuList(CpuList.parse(text).cpus & CpuList.parse(may_use).cpus))
    if not given:
        raise InvalidField("cpuset", text, f"some of the CPUs of {name}: {may_use}")
    if given == text:
        return given, ""
    why = f"{name} may use {may_use}, so the call got {given}."
    return given, f"cpuset: you asked for {text}; {why}"


def _as_asked(above: Cgroup, name: str, text: str) -> tuple[str, str]:
    """Give what is asked for: the kernel holds a call to the limits above it as well."""
    return text, ""


def _of_each_device(key: str, text: str) -> list[str]:
    """Give the lines of io.max for a limit in bytes a second of each device."""
    return [f"{device} {key}={text}" for device in whole_devices()]


NET_SEND = "net_send_max"
"""Name of what programs hold a call to, where no interface file does."""
CPUSET_EFFECTIVE = Knob("cpuset.cpus.effective", str.strip)
SETTINGS: Mapping[str, Setting] = {
    "cpuset": Setting("cpuset.cpus", "cpuset", _cpus_within),
    "io_read_max": Setting("io.max", "io", _as_asked, partial(_of_each_device, "rbps")),
    "io_write_max": Setting("io.max", "io", _as_asked, partial(_of_each_device, "wbps")),
}
"""By the name of the field."""


def _gives(session: Session, setting: Setting, outer: Sequence[Cgroup]) -> bool:
    """Have a session give a setting's controller to its calls, and those in `outer` to the calls
    inside them; False where it has none itself."""
    if setting.file not in session.offered:
        if setting.controller not in session.cgroup.read(knobs.CGROUP_CONTROLLERS):
            return False
        if session.cgroup.enable((setting.controller,)):
            return False
        session.offered = session.agent.files()
    if any(cgroup.enable((setting.controller,)) for cgroup in outer):
        return False
    return setting.file in session.offered


class _Writer:
    """Writes interface files of a call, and remembers those that this kernel does not offer."""

    def __init__(self, session: Session, cgroup: Cgroup) -> None:
        self._session, self._cgroup = session, cgroup
        self.missing: list[str] = []

    def put(self, knob: Knob[T], value: T, wanted: bool) -> None:
        """Write a limit where one is `wanted`. Raises KnobError."""
        if not wanted:
            return
        if knob.file in self._session.offered:
            self._cgroup.write(knob, value)
        else:
            self.missing.append(knob.file)

    def note(self, knob: Knob[T]) -> None:
        """Remember an interface file that is wanted, where it is not offered."""
        if knob.file not in self._session.offered:
            self.missing.append(knob.file)

    def put_settings(self, settings: Mapping[str, str]) -> None:
        """Write settings that have been settled. Raises KnobError."""
        for name, text in settings.items():
            setting = SETTINGS[name]
            file, lines = setting.file, setting.lines(text)
            if file not in self._session.offered or not lines:
                self.missing.append(file)
            for line in lines if file in self._session.offered else ():
                self._write_line(file, line)

    def _write_line(self, file: str, line: str) -> None:
        try:
            self._cgroup.write_text(file, line)
        except KnobError as error:
            if file != "io.max" or error.errno not in NO_SUCH_DEVICE:
                raise
            log.debug("%s", error)


def settle(
    session: Session,
    grant: Grant,
    before: Mapping[str, str] | None = None,
    outer: Sequence[Cgroup] = (),
) -> Grant:
    """Cut the settings of a grant to what can be had above it; those that are as `before` stay.
    `outer`: the cgroups of the calls that it is in, the outermost first. Nothing is written to the
    call. Raises InvalidField or KnobError."""
    if not grant.settings:
        return grant
    above, whose = (outer[-1], "the call around it") if outer else (session.cgroup, "this session")
    settled, advice = dict(grant.settings), list(grant.advice)
    for name, text in grant.settings.items():
        setting = SETTINGS[name]
        is_new = before is None or before.get(name) != text
        if is_new and _gives(session, setting, outer):
            settled[name], sentence = setting.within(above, whose, text)
            advice += [sentence] if sentence else []
    return replace(grant, settings=settled, advice=tuple(advice))


def write_grant(
    session: Session, cgroup: Cgroup, grant: Grant, outer: Sequence[Cgroup] = ()
) -> Grant:
    """Settle a new call's grant, set its interface files, and return the grant as it is in force:
    files that this kernel does not offer are named in it. `outer`: as for `settle`. Raises
    InvalidField or KnobError."""
    granted = _write(session, cgroup, settle(session, grant, outer=outer))
    if granted.memory_high_bytes is not None and knobs.MEMORY_HIGH.file in session.offered:
        cgroup.write(knobs.MEMORY_HIGH, granted.memory_high_bytes)
    return granted


def _write(session: Session, cgroup: Cgroup, grant: Grant) -> Grant:
    writer = _Writer(session, cgroup)
    writer.put(knobs.MEMORY_MAX, grant.memory_max_bytes, grant.memory_max_bytes is not None)
    if grant.memory_high_bytes is not None:
        writer.note(knobs.MEMORY_HIGH)
    if knobs.MEMORY_OOM_GROUP.file in session.offered:
        cgroup.write(knobs.MEMORY_OOM_GROUP, True)
    writer.put(knobs.PIDS_MAX, grant.pids_max, grant.pids_max is not None)
    writer.put(knobs.CPU_WEIGHT, grant.cpu_weight, grant.cpu_weight != 100)
    if grant.io_weight_asked or grant.io_weight not in (None, DEFAULT_WEIGHT):
        kept = write_weight(cgroup, grant.io_weight or DEFAULT_WEIGHT)
        if grant.io_weight_asked and not kept:
            writer.missing.append(knobs.IO_WEIGHT.file)
    if grant.cpu_max_millicores is not None:
        writer.put(knobs.CPU_MAX, knobs.CpuMax(grant.cpu_max_millicores * 100), True)
    writer.put_settings(grant.settings)
    if grant.net_send_bytes_per_s is not None and session.traffic is None:
        writer.missing.append(NET_SEND)
    return replace(grant, not_enforced=tuple(writer.missing)) if writer.missing else grant


def rewrite_grant(session: Session, cgroup: Cgroup, old: Grant, new: Grant) -> Grant:
    """Set the interface files of an open call to its new grant, which has been settled; limits that
    only the old one has are taken back. All but memory.high, which `memory_high.write` sets from
    the grant that is returned. Raises KnobError."""
    granted = _write(session, cgroup, new)
    if new.cpu_max_millicores is None and knobs.CPU_MAX.file in session.offered:
        cgroup.write(knobs.CPU_MAX, knobs.CpuMax(None))
    if new.cpu_weight == 100 and old.cpu_weight != 100:
        cgroup.write(knobs.CPU_WEIGHT, 100)
    usual = (None, DEFAULT_WEIGHT)
    if not new.io_weight_asked and new.io_weight in usual and old.io_weight not in usual:
        write_weight(cgroup, DEFAULT_WEIGHT)
    return granted


AGENT_OOM_SCORE_ADJ = -500
"""The value for an agent's own processes. Between it and the least that a call has lies the whole
limit: however much the agent holds, no process of it is chosen as long as one of a call is
there."""


def oom_score_adj(priority: int) -> int:
    """The value for the processes of a call: 600 for an important one, 750 for a normal one, 900
    for batch. So many thousandths of the limit that is reached are added to what a process holds
    (mm/oom_kill.c: oom_badness)."""
    return 1000 - 5 * priority


OOM_SCORE_ADJ_MOST = 1000
OOM_STEP = 100
"""Distance between an agent and its calls where its runtime gave it a high value: a tenth of the
limit that is reached."""


def put_call_before_agent(session: Session, cgroup: Cgroup, pid: int, priority: int) -> None:
    """Have the kernel choose the processes of a call before those of its agent, and by priority:
    with the value for the priority, or one above that of the agent, which the process `pid` that
    has just entered was forked with. A runtime may have given an agent as much as 1000 (Kubernetes
    does to pods without requests); it is lowered then. Raises KnobError."""
    inherited = _oom_score_adj_of(pid)
    if inherited is None:
        return
    wanted = min(OOM_SCORE_ADJ_MOST, max(oom_score_adj(priority), inherited + OOM_STEP))
    if inherited + OOM_STEP > OOM_SCORE_ADJ_MOST:
        for agent in session.agent.procs():
            if (_oom_score_adj_of(agent) or 0) > OOM_SCORE_ADJ_MOST - OOM_STEP:
                set_oom_score_adj(agent, OOM_SCORE_ADJ_MOST - OOM_STEP)
    set_oom_score_adj(pid, wanted)
    # A child that was forked while its parent was moved has the value from before.
    for other in cgroup.procs():
        if other != pid and _oom_score_adj_of(other) == inherited:
            set_oom_score_adj(other, wanted)


_OOM_BYTES_MAX = 16


def _oom_score_adj_of(pid: int) -> int | None:
    """The value of a process; None where it has gone."""
    try:
        return int(read_proc(pid, "oom_score_adj", _OOM_BYTES_MAX))
    except (OSError, ValueError):
        return None


def set_oom_score_adj(pid: int, value: int) -> None:
    """Tell the kernel whom to choose when a limit above the calls is reached: a call, and the least
    important one, rather than the agent."""
    try:
        # Without what `open` does besides, because a tool cannot start before this is done.
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % value)
        finally:
            os.close(fd)
    except PermissionError:
        # Lowering the value needs CAP_SYS_RESOURCE, which a container's root may lack.
        log.warning(
            "process %d keeps its oom_score_adj, where %d was wanted: the daemon lacks "
            "CAP_SYS_RESOURCE, and the kernel may choose an agent before its calls",
            pid,
            value,
        )
    except OSError as error:
        log.debug("oom_score_adj of %d: %s", pid, error)
