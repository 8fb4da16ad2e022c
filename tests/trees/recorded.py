"""Process trees of real agents, as they were recorded: what each starts for itself, and how it
starts a tool. `inside` names the call that a process belongs to; what is `outside` belongs to none.

Claude Code 2.1.332 and 2.1.197, Codex 0.171.0, Gemini CLI 0.61.0, OpenHands 1.58.2, SWE-ReX 1.4.0,
mini-swe-agent 2.4.6, aider 0.86.2, opencode, langchain's shells, and servers of the Model Context
Protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trees import (
    GROUP,
    JOIN,
    SETSID,
    WAIT,
    Words,
    become,
    called,
    does,
    fork,
    inside,
    nap,
    outside,
    spawn,
    start,
    thread,
)
from tests.trees.wraps import claude, claude_sandbox, codex, gemini

RECORDINGS = Path(__file__).with_name("recordings.json")
"""What strace has seen of SWE-ReX and aider (tests/agents/recording.py)."""
Found = tuple[str, str]
"""A call's name, and the last of its arguments in the report."""


@dataclass(frozen=True)
class Tree:
    """What an agent did once."""

    what: str
    tree: Words
    calls: list[Found]
    """The calls that are to be found, in any order."""


def _claude(what: str, *parts: Words, calls: list[Found]) -> Tree:
    return Tree(f"Claude Code: {what}", become(["claude", "-p", "go"], *parts), calls)


def _claude_bash(command: str, *parts: Words) -> Words:
    return spawn(["/bin/bash", "-c", claude(command)], *parts, WAIT, setsid=True)


_CLAUDE_STARTS = does(
    start(["/bin/bash", "-c", "env"], become(["env"], outside("env"))),
    spawn(
        [
            *("/bin/bash", "-c", "-l"),
            "SNAPSHOT_FILE=/home/u/.claude/shell-snapshots/snapshot-bash-1-a.sh\n      \n"
            "      # No user config file to source\n      \n"
            '      echo "# Snapshot file" >| "$SNAPSHOT_FILE"\n'
            "      # When this file is sourced, unalias first\n"
            '      echo "unalias -a 2>/dev/null || true" >> "$SNAPSHOT_FILE"\n',
        ],
        fork(outside("a subshell")),
        start(["sed", "s/^declare -f //"], outside("sed")),
        outside("snapshot"),
        WAIT,
    ),
    spawn(
        ["/bin/sh", "-c", 'ps aux | grep -E "code|cursor|windsurf|idea" | grep -v grep'],
        start(["ps", "aux"], outside("ps")),
        start(["grep", "-E", "code|cursor|windsurf|idea"], outside("grep")),
        WAIT,
    ),
    spawn(["/bin/sh", "-c", "npm root -g"], become(["node", "/usr/bin/npm", "root", "-g"])),
    spawn(["git", "rev-parse", "--is-inside-work-tree"], outside("git")),
    spawn(["git", "status", "--short"], outside("git")),
    spawn(["git", "log", "--oneline", "-n", "5"], outside("git")),
    spawn(["git", "config", "--get", "remote.origin.url"], outside("git")),
    spawn(["rg", "--files", "--hidden", "--glob", "!.git"], outside("rg --files")),
    spawn(["uname", "-a"], outside("uname")),
    WAIT,
)


def _claude_trees() -> list[Tree]:
    hook = ["/bin/sh", "-c", "python3 /home/u/hook.py PreToolUse"]
    server = ["python3", "/home/u/mcp_demo.py"]
    sandboxed = claude_sandbox("make -j4 'all it'")
    bwrap = ["bwrap", "--new-session", "--die-with-parent", "--unshare-pid", "--", "/bin/bash"]
    return [
        _claude("its own start", _CLAUDE_STARTS, outside("claude"), calls=[]),
        _claude(
            "Bash",
            _CLAUDE_STARTS,
            _claude_bash(
                "echo simple; grep 0:: /proc/self/cgroup",
                inside("grep"),
                start(["grep", "0::", "/proc/self/cgroup"], inside("grep")),
            ),
            calls=[("grep", "echo simple; grep 0:: /proc/self/cgroup")],
        ),
        _claude(
            "Bash, in the background, and another",
            _claude_bash(
                "npm run dev",
                start(
                    ["node", "/usr/bin/npm", "run", "dev"],
                    inside("npm"),
                    called("npm run dev"),
                    start(["sh", "-c", "vite"], start(["node", "vite"], inside("npm")), WAIT),
                    WAIT,
                ),
            ),
            _claude_bash("pwd", inside("pwd")),
            calls=[("npm", "npm run dev"), ("pwd", "pwd")],
        ),
        _claude(
            "three at once",
            *(
                _claude_bash(
                    f"FOO={n} python3 -c 'x'",
                    start(["python3", "-c", "x"], inside("python3")),
                )
                for n in range(3)
            ),
            calls=[("python3", f"FOO={n} python3 -c 'x'") for n in range(3)],
        ),
        _claude(
            "hooks around Bash",
            spawn(hook, become(["python3", *hook[2].split()[1:]], outside("hook"))),
            WAIT,
            _claude_bash("cargo build", start(["cargo", "build"], inside("cargo"))),
            WAIT,
            spawn(hook, start(["python3", *hook[2].split()[1:]], outside("hook")), WAIT),
            calls=[("cargo", "cargo build")],
        ),
        _claude(
            "sandbox",
            spawn(["/bin/sh", "-c", "bwrap --new-session --die-with-parent -- true"], WAIT),
            spawn(["bwrap", "--version"], outside("bwrap")),
            spawn(["socat", "UNIX-LISTEN:/tmp/claude-http-1.sock,fork", "TCP:127.0.0.1:1"]),
            WAIT,
            spawn(
                [*bwrap, "-c", sandboxed],
                fork(
                    become(
                        ["/bin/bash", "-c", sandboxed],
                        start(["socat", "TCP4-LISTEN:3128,fork", "UNIX-CONNECT:/tmp/x"], nap(1)),
                        start(
                            ["apply-seccomp", "/bin/bash", "-c", "exec 3<&-; " + claude("make")],
                            become(
                                ["/bin/bash", "-c", "exec 3<&-; " + claude("make -j4 'all it'")],
                                start(["make", "-j4", "all it"], inside("make")),
                                WAIT,
                            ),
                        ),
                        inside("make"),
                        WAIT,
                    )
                ),
                outside("bwrap"),
                WAIT,
            ),
            calls=[("make", "make -j4 'all it'")],
        ),
        _claude(
            "a prefix of the user's",
            spawn(
                ["/bin/bash", "-c", "/home/u/prefix.sh " + _quoted(claude("go test ./..."))],
                become(
                    ["/bin/sh", "/home/u/prefix.sh", claude("go test ./...")],
                    start(["go", "test", "./..."], inside("go")),
                    WAIT,
                ),
            ),
            calls=[("go", "go test ./...")],
        ),
        _claude(
            "a server of its own, and that server's tools",
            spawn(
                server,
                outside("server"),
                spawn(["pytest", "-q"], inside("pytest")),
                spawn(
                    ["/bin/sh", "-c", "echo from mcp; du -s ."],
                    start(["du", "-s", "."], inside("du")),
                    WAIT,
                ),
                WAIT,
                outside("server, later"),
            ),
            calls=[("pytest", "-q"), ("du", "echo from mcp; du -s .")],
        ),
        _claude(
            "a server by npx",
            spawn(
                ["/usr/bin/env", "node", "/usr/bin/npx", "mcpdemo"],
                become(["node", "/usr/bin/npx", "mcpdemo"], called("npm exec mcpdem")),
                outside("npx"),
                spawn(
                    ["sh", "-c", "'mcpdemo'"],
                    start(
                        ["node", "/home/u/.npm/_npx/1/node_modules/.bin/mcpdemo"],
                        called("MainThread"),
                        outside("server"),
                        spawn(
                            ["/bin/sh", "-c", "ruff check"],
                            start(["ruff", "check"], inside("ruff")),
                            WAIT,
                        ),
                        WAIT,
                    ),
                    WAIT,
                ),
                WAIT,
                comm="npx",
            ),
            calls=[("ruff", "ruff check")],
        ),
        _claude("Grep", spawn(["rg", "needle", "src"], inside("rg")), calls=[("rg", "src")]),
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


_LSB_RELEASE = become(
    ["/bin/sh", "/usr/bin/lsb_release", "-a"],
    start(["getopt", "--name", "lsb_release", "-o", "hvidrcas"], outside("getopt")),
    fork(
        fork(nap(1)),
        start(["cut", "-c1"], outside("cut")),
        start(["tr", "[:lower:]", "[:upper:]"], outside("tr")),
        WAIT,
    ),
    WAIT,
    comm="lsb_release",
)
_CODEX_STARTS = does(
    called("codex-main"),
    fork(_LSB_RELEASE),
    thread("tokio-rt-worker", _LSB_RELEASE),
    start(["getconf", "LONG_BIT"], outside("getconf")),
    thread(
        "plugins-curated",
        become(
            [
                "/usr/bin/git",
                "-c",
                "safe.bareRepository=explicit",
                "ls-remote",
                "https://x",
                "HEAD",
            ],
            start(
                ["/usr/lib/git-core/git", "remote-https", "https://x", "https://x"],
                start(["/usr/lib/git-core/git-remote-https", "https://x"], outside("git-remote")),
                WAIT,
            ),
            WAIT,
        ),
    ),
    thread(
        "tokio-runtime-w",
        SETSID,
        become(
            [
                *("/bin/bash", "-lc"),
                'if [ -z "${BASH_ENV-}" ] && [ -n "${HOME-}" ] && [ -r "$HOME/.bashrc" ]; then\n'
                "  . \"$HOME/.bashrc\"\nfi\necho '# Snapshot file'\n"
                "echo '# Unset all aliases to avoid conflicts with functions'\n"
                "echo 'unalias -a 2>/dev/null || true'\nshopt -p || true\n",
            ],
            start(["sed", "s/^declare -x //"], outside("sed")),
            outside("snapshot"),
            WAIT,
        ),
    ),
    thread(
        "tokio-runtime-w",
        become(
            ["/bin/bash", "-c", 'set -e; . "/home/u/.codex/shell_snapshots/01a2254c.tmp-1"'],
            outside("snapshot, tried"),
        ),
    ),
    thread("tokio-runtime-w", become(["git", "rev-parse", "--git-dir"], outside("git"))),
    WAIT,
)


def _codex(what: str, *parts: Words, calls: list[Found]) -> Tree:
    front = become(
        ["node", "/usr/bin/codex", "exec", "go"],
        spawn(["/x/vendor/codex", "exec", "go"], outside("codex"), *parts, WAIT),
        outside("front"),
        WAIT,
    )
    return Tree(f"Codex: {what}", front, calls)


def _codex_trees() -> list[Tree]:
    command = "cat a | wc -l; make test"
    runs = become(
        ["/bin/bash", "-c", codex(command)],
        become(
            ["/bin/bash", "-c", command],
            inside("make"),
            start(["cat", "a"], inside("make")),
            start(["make", "test"], inside("make")),
            WAIT,
        ),
    )
    setup = ["/proc/self/exe", "--codex-run-as-process-setup", "46", "1", "pipe", "", "/w"]
    outer = ["codex-linux-sandbox", "--sandbox-policy-cwd", "/w", "--", "/bin/bash", "-c", "x"]
    bwrap = ["bwrap", "--unshare-user", "--", "codex-linux-sandbox", "--", "/bin/bash", "-c", "x"]
    inner = ["codex-linux-sandbox", "--apply-seccomp-then-exec", "--", "/bin/bash", "-c", "x"]
    plain = ["/bin/bash", "-c", "echo nologin; sleep 0.1"]
    return [
        _codex("its own start", _CODEX_STARTS, calls=[]),
        _codex(
            "exec_command",
            _CODEX_STARTS,
            thread("tokio-runtime-w", SETSID, runs),
            calls=[("make", command)],
        ),
        _codex(
            "exec_command, by itself executed anew",
            thread("tokio-rt-worker", become([*setup, "/bin/bash", "/bin/bash", "-c", "x"], runs)),
            calls=[("make", command)],
        ),
        _codex(
            "exec_command, in its sandbox",
            thread(
                "tokio-runtime-w",
                SETSID,
                become(
                    outer,
                    become(bwrap, fork(become(inner, runs)), outside("bwrap"), WAIT),
                ),
            ),
            calls=[("make", command)],
        ),
        _codex(
            "exec_command, without a login",
            thread(
                "tokio-runtime-w",
                become(outer, become(plain, start(["sleep", "0.1"], inside("echo")), WAIT)),
            ),
            calls=[("echo", plain[2])],
        ),
        _codex(
            "a server's tools",
            thread(
                "tokio-runtime-w",
                become(
                    ["uvx", "mcp-server-git"],
                    become(
                        ["python3", "/home/u/.cache/uv/bin/mcp-server-git"],
                        outside("server"),
                        spawn(["git", "clone", "https://example.org/x"], inside("git")),
                        WAIT,
                    ),
                ),
            ),
            calls=[("git", "https://example.org/x")],
        ),
    ]


def _gemini(what: str, *parts: Words, calls: list[Found]) -> Tree:
    again = spawn(
        ["node", "--max-old-space-size=8192", "/usr/bin/gemini", "-p", "go"],
        called("MainThread"),
        spawn(["git", "--version"], outside("git")),
        spawn(["rg", "--version"], outside("rg")),
        spawn(["which", "docker"], outside("which")),
        spawn(["/bin/sh", "-c", "lspci -vvv  2>/dev/null"], outside("lspci")),
        spawn(["/bin/sh", "-c", "clinfo --raw"], outside("clinfo")),
        spawn(
            [*("/bin/sh", "-c"), "xdpyinfo 2>/dev/null | grep 'depth' | awk '{ print $5 }'"],
            start(["xdpyinfo"], outside("xdpyinfo")),
            start(["grep", "depth"], outside("grep")),
            start(["awk", "{ print $5 }"], outside("awk")),
            WAIT,
        ),
        *parts,
        outside("gemini"),
        WAIT,
    )
    return Tree(
        f"Gemini CLI: {what}",
        become(["node", "/usr/bin/gemini", "-p", "go"], called("MainThread"), again, WAIT),
        calls,
    )


def _gemini_trees() -> list[Tree]:
    command = "npm test -- --run"
    return [
        _gemini(
            "run_shell_command",
            spawn(
                ["bash", "-c", gemini(command)],
                fork(start(["npm", "test", "--", "--run"], inside("npm")), inside("npm"), WAIT),
                inside("npm"),
                WAIT,
                setsid=True,
            ),
            calls=[("npm", command)],
        ),
        _gemini(
            "grep_search", spawn(["rg", "--json", "needle"], inside("rg")), calls=[("rg", "needle")]
        ),
    ]


_JOBS: list[Found] = [("sleep", "0.2"), ("pytest", "-x"), ("cat", "a"), ("bash", "build.sh")]


def _jobs(has_control: bool) -> Words:
    """What a shell that reads its commands is sent: four jobs, of which one is a pipeline and one a
    script; and what it does for its prompt."""
    own, same = (GROUP, JOIN) if has_control else ([], [])
    return does(
        outside("shell"),
        fork(own, become(["sleep", "0.2"], inside("sleep"))),
        WAIT,
        fork(own, become(["whoami"], outside("prompt"))),
        WAIT,
        fork(
            own,
            become(
                ["pytest", "-x"],
                inside("pytest"),
                start(["python3", "-c", "worker"], inside("pytest")),
                WAIT,
            ),
        ),
        WAIT,
        fork(own, become(["cat", "a"], inside("cat"), nap(400))),
        nap(20),
        fork(same, become(["wc", "-l"], inside("cat"))),
        WAIT,
        nap(150),
        fork(
            own,
            become(["bash", "build.sh"], start(["make"], inside("bash")), inside("bash"), WAIT),
        ),
        WAIT,
    )


def _openhands(what: str, nice: str, window: Words) -> Tree:
    """OpenHands in tmux, whose first window it leaves for one with a shell of its own."""
    pane = [nice, "-n", "10", "/bin/bash"]
    shell = become(["sh", "-c", " ".join(pane)], become(pane, become(["/bin/bash"], _jobs(True))))
    panes = does(fork(SETSID, window), fork(SETSID, shell))
    server = fork(SETSID, called("tmux: server"), panes, nap(1), outside("tmux"), WAIT)
    return Tree(
        what,
        become(
            ["python3", "-m", "openhands.agent_server"],
            spawn(["tmux", "-V"], outside("tmux -V")),
            spawn(["tmux", "-L", "openhands", "new-session", "-d"], fork(server), WAIT),
            WAIT,
        ),
        _JOBS,
    )


def _python_trees() -> list[Tree]:
    argv = ["python3", "-m", "pytest", "-x"]
    script = "cd /testbed && python3 -m pytest -x"
    return [
        _openhands("OpenHands, by tmux", "nice", become(["tmux"], outside("tmux"))),
        _openhands(
            "OpenHands, by tmux, with a login shell before its own",
            "/usr/bin/nice",
            become(
                ["-bash"],
                fork(GROUP, become(["run-parts", "--list", "/etc/profile.d"], outside("profile"))),
                WAIT,
                fork(GROUP, become(["clear"], outside("clear"))),
                WAIT,
            ),
        ),
        Tree(
            "OpenHands, by a subprocess",
            become(["python3"], spawn(["bash", "-i"], _jobs(True), setsid=True), WAIT),
            _JOBS,
        ),
        Tree(
            "mini-swe-agent",
            become(
                ["python3", "/x/bin/mini", "-t", "go"],
                called("mini"),
                spawn(["/bin/sh", "-c", script], start(argv, inside("python3")), WAIT),
                spawn(
                    ["bash", "-c", "sed -i s/a/b/ f && git diff"],
                    start(["sed", "-i", "s/a/b/", "f"], inside("sed")),
                    start(["git", "diff"], inside("sed")),
                    WAIT,
                ),
                WAIT,
            ),
            [("python3", script), ("sed", "sed -i s/a/b/ f && git diff")],
        ),
        Tree(
            "langchain, a shell for each command",
            become(
                ["python3", "agent.py"],
                spawn(["/bin/sh", "-c", "ls; wc -l a"], start(["wc"], inside("ls")), WAIT),
                WAIT,
            ),
            [("ls", "ls; wc -l a")],
        ),
        Tree(
            "langchain, one shell for all",
            become(
                ["python3", "agent.py"],
                spawn(
                    ["env", "-i", "bash", "--norc", "--noprofile"],
                    become(["bash", "--norc", "--noprofile"], _jobs(True)),
                    setsid=True,
                ),
                WAIT,
            ),
            _JOBS,
        ),
        Tree(
            "langchain, one shell behind a pipe",
            become(["python3", "agent.py"], spawn(["/bin/bash"], _jobs(False)), WAIT),
            _JOBS,
        ),
        Tree(
            "a fleet of servers",
            become(
                ["python3", "agent.py"],
                *(
                    spawn(
                        ["python3", "-m", f"mcp_server_{n}"],
                        outside("server"),
                        spawn(["jq", str(n)], inside("jq")),
                        spawn(["/bin/sh", "-c", f"du -s {n}"], inside("du"), WAIT),
                        WAIT,
                    )
                    for n in range(8)
                ),
                WAIT,
            ),
            [("jq", str(n)) for n in range(8)] + [("du", f"du -s {n}") for n in range(8)],
        ),
        Tree(
            "a runtime's own helpers",
            become(
                ["python3", "agent.py"],
                spawn(
                    ["python3", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"],
                    outside("worker"),
                    spawn(["gcc", "-c", "a.c"], inside("gcc")),
                    WAIT,
                ),
                spawn(["pyright-langserver", "--stdio"], outside("language server")),
                fork(outside("a fork")),
                WAIT,
            ),
            [("gcc", "a.c")],
        ),
    ]


def played(steps: list[list[Any]]) -> Words:
    """Make words for the player of the steps that strace has seen. What is executed last in a
    process stays for a while, or it would have ended before it can be moved."""
    words: Words = []
    for number, (what, *given) in enumerate(steps):
        rest = [step[0] for step in steps[number + 1 :]]
        match what:
            case "exec":
                words += become(given[1], *([] if rest else [nap(300)]), comm=given[0])
            case "spawn":
                setsid = given[0][0] == ["setsid"]
                first, *others = given[0][1:] if setsid else given[0]
                after = played(others) if others else nap(300)
                words += spawn(first[2], after, comm=first[1], setsid=setsid)
            case "fork":
                if given[0][:1] == [["join"]]:
                    words += nap(50)  # so that which of a pipeline comes first is certain
                words += fork(played(given[0]))
            case "thread":
                words += thread("worker", played(given[0]))
            case _:
                words.append(what)
    return words


def _from_recordings() -> list[Tree]:
    rows = json.loads(RECORDINGS.read_text())
    return [
        Tree(row["what"], played(row["steps"]), [(name, last) for name, last in row["calls"]])
        for row in rows
    ]


RECORDED: list[Tree] = [
    *(*_claude_trees(), *_codex_trees(), *_gemini_trees(), *_python_trees()),
    *_from_recordings(),
]


@dataclass(frozen=True)
class Agent:
    """A program that starts tools, and what it gives a shell for a command."""

    argv: list[str]
    name: str = ""
    thread: str = ""
    wrap: Callable[[str], str] = str


AGENTS = {
    "Claude Code": Agent(["claude", "-p", "go"], wrap=claude),
    "Codex": Agent(["/x/codex", "exec"], thread="tokio-runtime-w", wrap=codex),
    "Gemini CLI": Agent(["node", "/usr/bin/gemini"], "MainThread", wrap=gemini),
    "OpenHands": Agent(["python3", "-m", "openhands.agent_server"]),
    "SWE-ReX": Agent(["python3", "/x/bin/swerex-remote"], thread="asyncio_0"),
    "mini-swe-agent": Agent(["python3", "/x/bin/mini"], "mini"),
    "aider": Agent(["python3", "/x/bin/aider"], "aider"),
    "opencode": Agent(["opencode", "run", "go"]),
    "langchain": Agent(["python3", "agent.py"], thread="ThreadPoolExec"),
}
SCRIPT = "cd /w && make -j2 all; git diff --stat"
_TOOL = does(
    inside("make"),
    start(["make", "-j2", "all"], inside("make"), fork(SETSID, inside("make")), WAIT),
    start(["git", "diff", "--stat"], inside("make")),
    WAIT,
)


def _shells(agent: Agent) -> dict[str, Words]:
    wrapped = agent.wrap(SCRIPT)
    bash = ["/bin/bash", "-c", wrapped]
    return {
        "fork and exec": start(bash, _TOOL),
        "posix_spawn": spawn(bash, _TOOL),
        "a session of its own": spawn(bash, _TOOL, setsid=True),
        "by a thread": thread(agent.thread or "worker", become(bash, _TOOL)),
        "a login shell": spawn(["/bin/bash", "-lc", wrapped], _TOOL),
        "options before the script": spawn(["/bin/bash", "-o", "pipefail", "-c", wrapped], _TOOL),
        "with sh": spawn(["/bin/sh", "-c", wrapped], _TOOL),
        "with zsh": spawn(["/usr/bin/zsh", "-c", wrapped], _TOOL),
        "forked twice": fork(fork(become(bash, _TOOL)), WAIT),
        "in bubblewrap": spawn(
            ["bwrap", "--unshare-all", "--", *bash], fork(become(bash, _TOOL)), WAIT
        ),
        "behind a time limit": spawn(
            ["/bin/bash", "-c", wrapped],
            start(["timeout", "60", "make"], fork(become(["make"], inside("make"))), WAIT),
            _TOOL,
        ),
        "one shell after the other": does(spawn(bash, _TOOL), WAIT),
    }


WAYS = list(_shells(AGENTS["aider"]))


def started(agent: str, way: str) -> Tree:
    """The tree of an agent that starts a tool in one of the ways; a call that is found is named
    after make."""
    of = AGENTS[agent]
    tree = become(of.argv, called(of.name) if of.name else [], _shells(of)[way], WAIT)
    return Tree(f"{agent}: {way}", tree, [("make", SCRIPT)])
