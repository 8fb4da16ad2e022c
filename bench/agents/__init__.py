"""Agents to record: real tools on real inputs, with pauses where a model would think."""
