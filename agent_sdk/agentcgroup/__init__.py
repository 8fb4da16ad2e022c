"""agentcgroup: resource control for AI agents, one tool call at a time."""
