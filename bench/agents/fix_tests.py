"""An agent that works on a Python project: reads, runs parts of the suite, edits, runs all of
it."""

from __future__ import annotations

from bench.agents.runner import Agent, work_dir


def main() -> None:
    """Read the project, run parts of its suite, edit a test, run all of it."""
    agent = Agent("fix_tests", work_dir())
    pytest = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    agent.think(3)
    agent.bash("ls -la; head -40 test_part0.py", cwd="suite")
    agent.think(2)
    agent.bash("grep -rn 'def test_' . | wc -l", cwd="suite")
    agent.think(3)
    agent.call("pytest", *pytest, "test_part0.py", cwd="suite")
    agent.think(5)
    agent.bash(
        "sed -i 's/range(40)/range(60)/' test_part1.py; grep -n range test_part1.py", cwd="suite"
    )
    agent.think(3)
    agent.call("pytest", *pytest, "test_part1.py", cwd="suite")
    agent.think(4)
    agent.call("pytest", *pytest, "test_part2.py", "-k", "round_trip or index", cwd="suite")
    agent.think(5)
    agent.bash("head -30 test_part2.py; python3 -m py_compile test_part1.py", cwd="suite")
    agent.think(2)
    agent.call("pytest", *pytest, cwd="suite")
    agent.think(4)
    agent.bash("find . -name '*.pyc' -delete; ls", cwd="suite")


if __name__ == "__main__":
    main()
