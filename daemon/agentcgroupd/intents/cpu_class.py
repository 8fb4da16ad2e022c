"""CPU classes: batch, normal and interactive, by which a priority becomes a weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agentcgroupd.config import Section
from agentcgroupd.config_values import Priority


class CpuClasses(Section):
    """CPU and IO by class, which follows from a call's priority."""

    batch_below: Priority = 35
    interactive_from: Priority = 65
    batch_weight_percent: Annotated[int, Field(ge=1, le=1000)] = 100
    """Percent of the weight that follows from the priority, which doubles for every 15 steps."""
    interactive_weight_percent: Annotated[int, Field(ge=1, le=1000)] = 100
    io_weight: bool = True
    """Set io.weight beside cpu.weight where the device's scheduler keeps it."""
