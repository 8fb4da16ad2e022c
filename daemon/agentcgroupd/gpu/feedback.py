"""What tenants of a GPU are told: devices that fail, memory over the quota, devices kept closed."""

from __future__ import annotations

import logging
import math

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.bpf import abi
from agentcgroupd.gpu.nvml import Fault
from agentcgroupd.gpu.state import CALL_LEAF, GpuState
from agentcgroupd.gpu.tenant import GpuTenant
from agentcgroupd.state.session import Session
from agentcgroupd.telemetry.notices import Notices
from agentcgroupd.units import show_bytes

log = logging.getLogger(__name__)

FELL_OFF_THE_BUS = 79
"""XID of a GPU that is gone (NVIDIA's catalogue of XID errors)."""


class GpuFeedback:
    """Tells tenants, and writes what concerns a device to the log, the audit and the metrics."""

    def __init__(self, state: GpuState, notices: Notices) -> None:
        self._state, self._notices = state, notices

    def tell(
        self, tenant: GpuTenant, code: pb.FeedbackCode.ValueType, sentence: str, **numbers: float
    ) -> None:
        """Send feedback to a tenant's agent and keep it for the report."""
        call_id = tenant.call.id if tenant.call else ""
        values = {name: float(number) for name, number in numbers.items()}
        feedback = pb.Feedback(code=code, sentence=sentence, numbers=values)
        self._notices.tell(tenant.session, call_id, feedback)
        tenant.feedback.append(feedback)

    def tell_once(
        self, tenant: GpuTenant, code: pb.FeedbackCode.ValueType, sentence: str, **numbers: float
    ) -> None:
        """Send feedback unless the tenant was sent one of that code before."""
        key = pb.FeedbackCode.Name(code)
        if key not in tenant.told:
            tenant.told.add(key)
            self.tell(tenant, code, sentence, **numbers)

    # Devices and MPS

    def fault(self, fault: Fault) -> None:
        """Report an error of a device (XID) to all tenants that have a part of it."""
        log.error("GPU %s: XID %d", fault.uuid, fault.xid)
        self._notices.metrics.gpu_faults.labels(str(fault.xid)).inc()
        self._notices.audit.write("gpu_fault", device=fault.uuid, xid=fault.xid)
        if fault.xid == FELL_OFF_THE_BUS:
            self.device_lost(fault.uuid, "it has fallen off the bus (XID 79)")
            return
        for tenant in self._state.tenants_on(fault.uuid):
            index = self._state.device(fault.uuid).index
            sentence = (
                f"The driver reports error XID {fault.xid} on GPU {index}; if it was this call's, "
                "its next CUDA call fails and a new process is needed."
            )
            self.tell(tenant, pb.FEEDBACK_CODE_GPU_FAULT, sentence, xid=fault.xid)

    def device_lost(self, uuid: str, why: str) -> None:
        """Mark a device as lost and tell its tenants; once for each device."""
        if not self._state.mark_lost(uuid):
            return
        log.error("GPU %s is lost: %s", uuid, why)
        self._notices.audit.write("gpu_lost", device=uuid, why=why)
        index = self._state.device(uuid).index
        for gauge in (self._notices.metrics.gpu_busy, self._notices.metrics.gpu_memory):
            gauge.labels(str(index)).set(math.nan)
        sentence = (
            f"GPU {index} does not answer any more: {why}. What runs on it fails; begin the call "
            "again on another device."
        )
        for tenant in self._state.tenants_on(uuid):
            self.tell(tenant, pb.FEEDBACK_CODE_GPU_LOST, sentence, device=index)

    def mps_ended(self) -> None:
        """Tell all tenants that MPS has ended under them."""
        sentence = (
            "MPS has ended, and with it what the call had on the GPU: its next CUDA call fails "
            "and a new process is needed."
        )
        for tenant in self._state.tenants.values():
            self.tell(tenant, pb.FEEDBACK_CODE_GPU_FAULT, sentence)

    # Processes

    def over_quota(self, tenant: GpuTenant, event: abi.VramEvent) -> None:
        """Count an allocation over the quota that a probe has seen; tell the tenant if the probe
        has refused it."""
        how = "refused" if event.refused else "seen"
        self._notices.metrics.gpu_refused.labels(how).inc()
        if not event.refused:
            return
        asked, used = show_bytes(event.size_bytes), show_bytes(event.used_bytes)
        sentence = (
            f"{asked} of GPU memory were refused: the call holds {used} of its quota of "
            f"{show_bytes(event.quota_bytes)}. Ask for more gpu_memory, or use smaller batches."
        )
        self.tell_once(
            tenant,
            pb.FEEDBACK_CODE_GPU_MEMORY_DENIED,
            sentence,
            asked_bytes=event.size_bytes,
            used_bytes=event.used_bytes,
            gpu_quota_bytes=event.quota_bytes,
        )

    def open_refused(self, session: Session, leaf: str, event: abi.GpuDeviceEvent) -> None:
        """Tell an agent what to ask for: the gate has kept a device closed to a process in this
        leaf of its session."""
        call = session.calls.get(leaf.removeprefix(CALL_LEAF))
        if call is not None and call.grant.gpu_percent is not None:
            what, ask = "another GPU than it was granted", "ask for it with gpu_device."
        else:
            what, ask = "a GPU, which needs a grant", 'begin the call with gpu="10%".'
        comm = event.comm.decode("utf-8", "replace")
        feedback = pb.Feedback(
            code=pb.FEEDBACK_CODE_GPU_CLOSED,
            sentence=f"{comm} tried to open {what}: {ask}",
            numbers={"major": float(event.major), "minor": float(event.minor)},
        )
        self._notices.tell(session, call.id if call else "", feedback)
