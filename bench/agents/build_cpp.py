"""An agent that gets a C++ program to build: it compiles file by file, then all of them, with
-O2."""

from __future__ import annotations

from bench.agents.runner import Agent, work_dir


def main() -> None:
    """Compile the C++ program file by file, then all of it with -O2."""
    agent = Agent("build_cpp", work_dir())
    agent.think(3)
    agent.bash("ls -la && wc -l *.cpp", cwd="cpp")
    agent.think(2)
    agent.bash("g++ --version | head -1; grep -c template part*.cpp", cwd="cpp")
    agent.think(4)
    agent.call("g++", "g++", "-std=c++17", "-c", "part0.cpp", "-o", "part0.o", cwd="cpp")
    agent.think(3)
    agent.call(
        "g++", "g++", "-std=c++17", "-O2", "-g", "-c", "part1.cpp", "-o", "part1.o", cwd="cpp"
    )
    agent.think(5)
    agent.call(
        "g++", "g++", "-std=c++17", "-O2", "-g", "-c", "part2.cpp", "-o", "part2.o", cwd="cpp"
    )
    agent.think(4)
    agent.bash("size *.o; ls -la *.o", cwd="cpp")
    agent.think(2)
    agent.call("g++", "g++", "-std=c++17", "-c", "main.cpp", "-o", "main.o", cwd="cpp")
    agent.call("g++", "g++", "main.o", "part0.o", "part1.o", "part2.o", "-o", "program", cwd="cpp")
    agent.think(2)
    agent.bash("./program; echo $?", cwd="cpp")
    agent.think(6)
    agent.bash(
        "for i in 0 1 2; do g++ -std=c++17 -O1 -c part$i.cpp -o fast$i.o & done; wait", cwd="cpp"
    )
    agent.think(3)
    agent.bash("strip program && ls -la program", cwd="cpp")


if __name__ == "__main__":
    main()
