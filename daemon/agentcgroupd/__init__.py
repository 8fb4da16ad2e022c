"""agentcgroupd: the privileged daemon of agentcgroup."""
