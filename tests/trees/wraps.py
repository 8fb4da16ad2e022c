"""What agents wrap around a model's command before a shell gets it: Claude Code 2.1.332, alone and
in its sandbox, Codex 0.171.0, Gemini CLI 0.61.0."""

from __future__ import annotations

import shlex
from collections.abc import Callable


def claude(command: str) -> str:
    """Wrap a command as Claude Code does."""
    return (
        "source /home/u/.claude/shell-snapshots/snapshot-bash-17-ab.sh 2>/dev/null || true && "
        "\\builtin shopt -u extglob 2>/dev/null || true && { \\builtin unalias -- 'which'; "
        "\\builtin unset -f -- 'which'; } >/dev/null 2>&1 || true && "
        f"eval {shlex.quote(command)} < /dev/null && pwd -P >| /tmp/claude-1eb4-cwd"
    )


def claude_sandbox(command: str) -> str:
    """Wrap a command as Claude Code does in its sandbox."""
    return (
        "{ socat TCP4-LISTEN:3128,fork UNIX-CONNECT:/tmp/claude-http-1.sock; } >/dev/null 2>&1 &\n"
        "trap 'rc=$?; kill %1 %2 2>/dev/null; exit $rc' EXIT\n"
        "SRT_ALLOW_NESTED_USERNS=0 ARGV0=apply-seccomp /proc/self/fd/3 /bin/bash -c "
        + shlex.quote("exec 3<&- || exit 126; " + claude(command))
    )


def codex(command: str) -> str:
    """Wrap a command as Codex does."""
    saved = "".join(
        f'__CODEX_SNAPSHOT_OVERRIDE_SET_{n}="${{VARIABLE_{n}+x}}"\n'
        f'__CODEX_SNAPSHOT_OVERRIDE_{n}="${{VARIABLE_{n}-}}"\n'
        for n in range(6)
    )
    return (
        f"{saved}\nif . '/home/u/.codex/shell_snapshots/1.sh' >/dev/null 2>&1; then :; fi\n"
        f'if [ -n "$__CODEX_SNAPSHOT_OVERRIDE_SET_0" ]; then export VARIABLE_0="x"; '
        f"else unset VARIABLE_0; fi\n\nexec '/bin/bash' -c {shlex.quote(command)}"
    )


def gemini(command: str) -> str:
    """Wrap a command as Gemini CLI does."""
    return (
        "shopt -u promptvars nullglob extglob nocaseglob dotglob; _bgpids_file='/tmp/g/bgpids.tmp'"
        f"\n(\n  trap 'jobs -p > \"$_bgpids_file\"' EXIT\n{command}\n)\n__code=$?\nexit $__code"
    )


WRAPS: dict[str, Callable[[str], str]] = {
    "CLAUDE": claude,
    "CLAUDE_SANDBOX": claude_sandbox,
    "CLAUDE_QUOTED": lambda command: shlex.quote(claude(command)),
    "CODEX": codex,
    "GEMINI": gemini,
}
