"""An agent that looks into a repository's history, clones it and packs it anew."""

from __future__ import annotations

from bench.agents.runner import Agent, work_dir


def main() -> None:
    """Look into the repository's history, clone it and pack it anew."""
    agent = Agent("history", work_dir())
    agent.think(3)
    agent.call("git", "git", "-C", "repo", "log", "--oneline", "-20")
    agent.think(2)
    agent.bash("git -C repo count-objects -v; du -sh repo/.git")
    agent.think(4)
    agent.call("git", "git", "clone", "-q", "--no-local", "repo", "clone")
    agent.think(3)
    agent.bash("git log --stat -30 | tail -40", cwd="clone")
    agent.think(4)
    agent.call("git", "git", "-C", "clone", "log", "-p", "--all", "-S", "bal", "--oneline")
    agent.think(5)
    agent.call("git", "git", "-C", "repo", "gc", "-q", "--aggressive", "--prune=now")
    agent.think(3)
    agent.bash("git -C repo fsck --full 2>&1 | tail -3; du -sh repo/.git")
    agent.think(4)
    agent.call("git", "git", "-C", "clone", "repack", "-q", "-a", "-d", "-f", "--window=200")
    agent.think(3)
    agent.bash("git -C clone status --short | head; rm -rf clone")


if __name__ == "__main__":
    main()
