"""An agent that sets up an environment: venv, pip install of a large wheel, imports, reinstall."""

from __future__ import annotations

from bench.agents.runner import Agent, work_dir

IMPORT_ALL = """
import importlib, pkgutil, bigpkg
found = [importlib.import_module("bigpkg." + m.name) for m in pkgutil.iter_modules(bigpkg.__path__)]
print(len(found), sum(len(m.TABLE) for m in found))
"""


def main() -> None:
    """Make an environment, install a large wheel, import all of it, install it again."""
    agent = Agent("packages", work_dir())
    pip = ("env/bin/python", "-m", "pip", "--disable-pip-version-check", "-q")
    offline = ("--no-index", "--find-links", "wheels", "--no-cache-dir")
    agent.think(3)
    agent.bash("ls -la wheels; python3 --version")
    agent.think(2)
    agent.call("venv", "python3", "-m", "venv", "env")
    agent.think(3)
    agent.call("pip", *pip, "install", *offline, "bigpkg")
    agent.think(4)
    agent.call("python", "env/bin/python", "-c", IMPORT_ALL)
    agent.think(3)
    agent.bash("du -sh env; find env -name '*.pyc' | wc -l")
    agent.think(4)
    agent.call("pip", *pip, "install", "--force-reinstall", *offline, "bigpkg")
    agent.think(3)
    agent.call("pip", *pip, "list")
    agent.think(2)
    agent.call("python", "env/bin/python", "-m", "compileall", "-q", "-f", "-j", "4", "env/lib")
    agent.think(5)
    agent.call("python", "env/bin/python", "-c", IMPORT_ALL)
    agent.think(3)
    agent.bash("rm -rf env")


if __name__ == "__main__":
    main()
