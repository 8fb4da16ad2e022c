"""Run a target with atheris: `python -m tests.fuzz TARGET [libFuzzer options]`, for a minute if no
option says otherwise. What it finds interesting is kept in build/fuzz/TARGET."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 60


def main() -> int:
    """Fuzz one target. Returns 2 where there is none of that name or no atheris."""
    try:
        import atheris as found
    except ImportError:
        print("atheris is not installed: pip install 'agentcgroup[fuzz]'", file=sys.stderr)
        return 2
    atheris: Any = found
    with atheris.instrument_imports(include=["agentcgroupd", "agentcgroup_lab"]):
        from tests.fuzz.targets import TARGETS

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        print(f"python -m tests.fuzz {{{','.join(TARGETS)}}}", file=sys.stderr)
        return 2
    corpus = ROOT / "build/fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={SECONDS}", "-timeout=10", *sys.argv[2:], str(corpus)]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
