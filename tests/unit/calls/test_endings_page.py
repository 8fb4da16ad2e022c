"""The page that lists how calls end says what the rules do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.facts import LimitHit
from agentcgroupd.calls.verdict import RULES, judge, report_of, rule_of
from agentcgroupd.state.ending import Asked, Asker
from tests.unit.calls.test_verdict import VERDICTS, facts

PAGE = Path(__file__).resolve().parents[3] / "docs/endings.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without those of its head."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def pattern(text: str) -> re.Pattern[str]:
    """Match words of the page, where `...` stands for anything."""
    parts = [re.escape(part) for part in re.split(r"\.\.\.", text)]
    return re.compile(".*".join(parts))


def test_the_rules_are_listed_in_their_order() -> None:
    assert [row[0] for row in rows("Verdicts")] == [rule.name for rule in RULES]


@pytest.mark.parametrize(("changes", "verdict", "_"), VERDICTS)
def test_a_row_says_the_verdict_and_the_sentence(
    changes: dict[str, Any], verdict: pb.Verdict.ValueType, _: list[str]
) -> None:
    end = facts(**changes)
    row = next(row for row in rows("Verdicts") if row[0] == rule_of(end).name)
    assert row[1] == f"`{pb.Verdict.Name(verdict).removeprefix('VERDICT_').lower()}`"
    sentence = judge(end)[1]
    assert pattern(row[2].removesuffix(" ...")).match(sentence), sentence
    assert row[3]


def test_what_is_said_besides_is_said_somewhere() -> None:
    ends = [facts(**changes) for changes, _, _ in VERDICTS] + [
        facts(asked=(Asked(Asker.TIMEOUT, 1, True, outside=2),)),
        facts(pids_hits=(LimitHit(pb.LEVEL_CALL, "x", 50, 7),)),
    ]
    reports = [report_of(end) for end in ends]
    said = [r.sentence for r in reports] + [f.sentence for r in reports for f in r.feedback]
    for row in rows("What is said besides"):
        words = pattern(row[1])
        assert any(words.search(text) for text in said), row[1]
        code = row[2].strip("`").upper()
        assert code == "IN THE SENTENCE" or f"FEEDBACK_CODE_{code}" in pb.FeedbackCode.keys()
