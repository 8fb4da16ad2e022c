"""Memory that an undeclared call leaves charged to its agent."""
