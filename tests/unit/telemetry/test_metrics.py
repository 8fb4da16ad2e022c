"""Metrics as they are scraped: names, labels, what is there from the start, who asks for them."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.telemetry import labels
from agentcgroupd.telemetry.metrics import ANY, Heartbeat, Metrics
from tools import metrics_page

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "deploy/monitoring"
RULES = MONITORING / "agentcg.rules.yml"
DASHBOARD = MONITORING / "agentcg.dashboard.json"
PROMTOOL = os.environ.get("AGENTCG_PROMTOOL") or shutil.which("promtool")
_SUFFIXES = ("_bucket", "_sum", "_count")
_NOT_OURS = {"up", "job", "instance"}


def names() -> dict[str, frozenset[str]]:
    """Every name that can be asked for, with its labels."""
    metrics, found = Metrics(), dict[str, frozenset[str]]()
    for family in metrics_page.families(metrics):
        name = metrics_page.full_name(family)
        own = frozenset(metrics.values[name])
        found[name] = own
        if family.type == "histogram":
            found |= {f"{name}{suffix}": own | {"le"} for suffix in _SUFFIXES}
    return found


def test_the_reference_page_is_current() -> None:
    text = metrics_page.PAGE.read_text()
    assert metrics_page.page(text, Metrics()) == text, "run python -m tools.metrics_page"


def test_names_have_their_unit_and_kind() -> None:
    for family in metrics_page.families(Metrics()):
        name = metrics_page.full_name(family)
        assert re.fullmatch(r"agentcg_[a-z0-9_]+", name)
        assert family.type == "counter" or not name.endswith("_total"), name
        assert not re.search(r"_(percent|ms|usec|kb|mb|count)(_|$)", name), name
        assert family.documentation, name


def test_every_series_is_there_from_the_start() -> None:
    metrics = Metrics()
    text = generate_latest(metrics.registry).decode()
    for family in metrics_page.families(metrics):
        own = metrics.values[metrics_page.full_name(family)]
        if ANY not in own.values():
            most = 1
            for values in own.values():
                most *= len(values)
            found = {tuple(sample.labels[name] for name in own) for sample in family.samples}
            assert len(found) == most, family.name
    assert 'agentcg_calls_ended_total{priority="batch",verdict="oom_pool"} 0.0' in text
    assert "_created" not in text


def test_labels_are_words() -> None:
    for family in metrics_page.families(Metrics()):
        for sample in family.samples:
            for name, value in sample.labels.items():
                is_number = name == "le" or family.name == "agentcg_build_info"
                assert is_number or re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", value), sample


def test_build_info_says_what_runs() -> None:
    text = generate_latest(Metrics().registry).decode()
    assert re.search(
        r'^agentcg_build_info\{kernel="[^"]+",python="3[^"]+",version="0[^"]+"\} 1\.0$', text, re.M
    )


def _literal_labels() -> Iterator[tuple[str, str]]:
    """`metrics.NAME.labels("a", ...)` in the daemon, and `refused("a")` of budgets: literals."""
    for path in (ROOT / "daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            found = (a.value for a in node.args if isinstance(a, ast.Constant))
            words = [word for word in found if isinstance(word, str)]
            owner = node.func.value
            if node.func.attr == "labels" and isinstance(owner, ast.Attribute):
                yield from ((owner.attr, word) for word in words[:1])
            elif node.func.attr in ("refused", "_refuse", "refuse", "_close_one") and words:
                if path.parent.name == "rpc" and path.name in ("budgets.py", "relay.py"):
                    yield "refused", words[0]
                elif node.func.attr == "refused":
                    yield "refused", words[0]


def test_every_label_that_the_code_sets_is_known() -> None:
    metrics = Metrics()
    known = {
        attribute: metrics.values[made._name + ("_total" if made._type == "counter" else "")]
        for attribute, made in vars(metrics).items()
        if hasattr(made, "_labelnames")
    }
    found = set(_literal_labels())
    assert {name for name, _ in found} >= {"refused", "calls_waited", "signals", "actions"}
    for attribute, word in found:
        values = known[attribute].values()
        assert any(some == ANY or word in some for some in values), (attribute, word)


@pytest.mark.parametrize(
    ("priority", "label"), [(0, "batch"), (49, "batch"), (50, "normal"), (79, "normal")]
)
def test_priorities_below_important(priority: int, label: str) -> None:
    assert labels.priority_label(priority) == label
    assert labels.priority_label(80) == labels.priority_label(100) == "important"


def value(metrics: Metrics, name: str, **found: str) -> float | None:
    """A sample by its full name."""
    sample: float | None = metrics.registry.get_sample_value(f"agentcg_{name}", found)
    return sample


def test_an_end_is_counted_by_verdict_and_priority_and_with_what_it_took() -> None:
    metrics = Metrics()
    report = pb.Report(
        verdict=pb.VERDICT_TIMEOUT,
        grant=pb.Grant(priority=80),
        wall_usec=2_000_000,
        cpu_usage_usec=500_000,
        memory_peak_bytes=1 << 20,
        io_read_bytes=4096,
        io_write_bytes=8192,
    )
    metrics.count_end(report)
    inner = pb.Report(verdict=pb.VERDICT_OK, parent_call_id="x", cpu_usage_usec=400_000)
    metrics.count_end(inner)
    assert value(metrics, "calls_ended_total", verdict="timeout", priority="important") == 1
    assert value(metrics, "calls_ended_total", verdict="ok", priority="batch") == 1
    assert value(metrics, "calls_cpu_seconds_total", priority="important") == 0.5
    assert value(metrics, "calls_cpu_seconds_total", priority="batch") == 0, "a part of another"
    assert value(metrics, "calls_memory_byte_seconds_total", priority="important") == 2 << 20
    written = value(metrics, "calls_io_bytes_total", direction="write", priority="important")
    assert written == 8192


def test_a_total_follows_a_count_that_begins_anew() -> None:
    metrics = Metrics()
    for count in (3, 5, 5, 2):
        metrics.cpu_events.follow(count, "boosts")
    assert value(metrics, "pool_cpu_events_total", event="boosts") == 5 + 2


def test_live_and_ready_are_told_apart_and_when_they_are_read() -> None:
    metrics, heartbeat = Metrics(), Heartbeat(limit_s=60)
    metrics.tell_health(heartbeat)
    assert (value(metrics, "live"), value(metrics, "ready")) == (1, 0)
    heartbeat.answered("agent")
    assert (value(metrics, "live"), value(metrics, "ready")) == (1, 1)
    heartbeat._limit_s = -1
    assert (value(metrics, "live"), value(metrics, "ready")) == (0, 0)


# Who asks for them


def expressions() -> list[str]:
    """All that the rules and the dashboard ask."""
    rules = [rule["expr"] for group in _yaml(RULES)["groups"] for rule in group["rules"]]
    board = json.loads(DASHBOARD.read_text())
    return rules + [t["expr"] for panel in board["panels"] for t in panel["targets"]]


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_rules_and_dashboard_ask_for_what_there_is() -> None:
    known, records = names(), {"agentcg:calls_lost:ratio1h", "agentcg:calls_ended:rate5m"}
    asked = expressions()
    assert len(asked) > 40
    for expression in asked:
        for name, matchers in re.findall(r"\b(agentcg[_:][a-z0-9_:]*)(\{[^}]*\})?", expression):
            if name in records:
                continue
            assert name in known, expression
            used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"", matchers))
            assert used <= known[name] | _NOT_OURS, expression
            grouped = re.findall(r"by \(([a-z, _]*)\)", expression)
            by = {word.strip() for words in grouped for word in words.split(",")}
            assert by <= known[name] | _NOT_OURS | {"le"}, expression


def metrics_in(expression: str) -> list[tuple[str, str]]:
    """Metrics of ours in an expression, without what a histogram adds, each with its matchers."""
    found = re.findall(r"\b(agentcg_[a-z0-9_]+)(?:\{([^}]*)\})?", expression)
    return [(re.sub(r"_(bucket|sum|count)$", "", name), matchers) for name, matchers in found]


def test_values_of_labels_that_are_asked_for_are_values_that_there_are() -> None:
    values, checked = Metrics().values, 0
    for expression in expressions():
        for name, matchers in metrics_in(expression):
            for label, sign, wanted in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
                known = values.get(name, {}).get(label, ANY)
                if not known:
                    continue
                checked += 1
                fits = re.compile(wanted if sign.endswith("~") else re.escape(wanted)).fullmatch
                assert any(fits(value) for value in known), (label, wanted, expression)
    assert checked > 3


def test_legends_of_the_dashboard_name_labels_that_the_series_have() -> None:
    known, legends = names(), 0
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            shown = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
            grouped = re.search(r"\bby \(([a-z, _]*)\)", expression)
            if grouped is not None:
                left = {word.strip() for word in grouped[1].split(",")}
            elif re.search(r"\b(sum|min|max|avg|count)\b", expression):
                left = set()
            else:
                left = _NOT_OURS.union(*(known[name] for name, _ in metrics_in(expression)))
            assert shown <= left, (panel["title"], target["legendFormat"])
            legends += len(shown)
    assert legends > 10


def test_each_panel_asks_the_data_source_that_was_chosen() -> None:
    board = json.loads(DASHBOARD.read_text())
    variables = {each["name"] for each in board["templating"]["list"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            used = set(re.findall(r"\$(?:\{)?(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval"}, target["expr"]


def test_verdicts_in_rules_are_verdicts() -> None:
    for expression in expressions():
        for words in re.findall(r'verdict=~"([^"]*)"', expression):
            for word in words.split("|"):
                assert any(re.fullmatch(word, verdict) for verdict in labels.VERDICTS), word


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    alerts = [r for g in _yaml(RULES)["groups"] for r in g["rules"] if "alert" in r]
    assert len(alerts) > 10
    for alert in alerts:
        assert {*alert["annotations"]} == {"summary", "what"}, alert["alert"]
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["what"].endswith("."), alert["alert"]


def test_panels_of_the_dashboard_do_not_lie_over_each_other() -> None:
    taken = set[tuple[int, int]]()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


if PROMTOOL is not None:  # in Debian's package prometheus, which is large

    @pytest.mark.parametrize(
        "words",
        [("check", "rules", RULES), ("test", "rules", MONITORING / "agentcg.rules.test.yml")],
    )
    def test_promtool_takes_the_rules(words: tuple[object, ...]) -> None:
        done = subprocess.run(
            [str(PROMTOOL), *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_promtool_takes_what_the_dashboard_asks(tmp_path: Path) -> None:
        board = json.loads(DASHBOARD.read_text())
        asked = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
        rules = [
            {
                "record": f"dashboard:panel:{number}",
                "expr": expression.replace("$__rate_interval", "1m").replace("$instance", ".*"),
            }
            for number, expression in enumerate(asked)
        ]
        path = tmp_path / "rules.yml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        done = subprocess.run(
            [str(PROMTOOL), "check", "rules", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
