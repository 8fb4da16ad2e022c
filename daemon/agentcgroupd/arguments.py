"""The command line of `agentcgroupd`."""

from __future__ import annotations

from pathlib import Path

from agentcgroup.cli.parser import Parser

EPILOG = """\
exit status:
  0   it was stopped
  1   it could not go on
  2   wrong usage
  78  the configuration or the installation cannot be used
"""


def make_parser(version: str) -> Parser:
    """Make the parser; `version` is what --version says."""
    parser = Parser(
        prog="agentcgroupd",
        description="Controls what sandboxed AI agents may use, one tool call at a time.",
        epilog=EPILOG,
    )
    file_help = "TOML file (default: none, all defaults; see 'agentcg config show')"
    parser.add_argument("--config", type=Path, metavar="FILE", help=file_help)
    check_help = "say what would keep it from starting, or print every setting"
    parser.add_argument("--check", action="store_true", help=check_help)
    parser.add_argument("--verbose", action="store_true", help="log every step")
    parser.add_argument("--version", action="version", version=f"agentcgroupd {version}")
    return parser
