"""What is told to Kubernetes of a node: the estimate, its steadiness, and the request over HTTP."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from agentcgroupd.errors import ConfigError
from agentcgroupd.headroom.__main__ import AGAIN_S, Publisher
from agentcgroupd.headroom.estimate import (
    Numbers,
    Settings,
    Steady,
    agents_that_fit,
    large_call_bytes,
)
from agentcgroupd.headroom.metrics import NoNumbers, numbers_of, read
from agentcgroupd.headroom.node import Node, NotTold
from agentcgroupd.telemetry.metrics import Metrics

GIB, MIB = 1 << 30, 1 << 20
SETTINGS = Settings(least_bytes=128 * MIB, agents_max=250)


def test_an_empty_node_has_room_for_agents_that_hold_the_least() -> None:
    assert agents_that_fit(Numbers(2 * GIB, 0, 0), SETTINGS) == 8


def test_few_are_let_onto_a_node_before_it_is_known_what_they_hold() -> None:
    assert agents_that_fit(Numbers(64 * GIB, 0, 0), SETTINGS) == 16
    assert agents_that_fit(Numbers(64 * GIB, GIB, 2), SETTINGS) == 16
    assert agents_that_fit(Numbers(64 * GIB, 4 * GIB, 16), SETTINGS) == 32
    assert agents_that_fit(Numbers(640 * GIB, 40 * GIB, 200), SETTINGS) == 250


def test_further_agents_hold_what_the_present_ones_do() -> None:
    # 20 agents hold 4 GiB; beside one large call of 1 GiB there is room for 15 more like them.
    numbers = Numbers(8 * GIB, 4 * GIB, 20, ((float(GIB), 100.0), (math.inf, 100.0)))
    assert agents_that_fit(numbers, SETTINGS) == 35


def test_a_full_node_has_room_for_those_that_are_there() -> None:
    assert agents_that_fit(Numbers(8 * GIB, 8 * GIB, 3), SETTINGS) == 3
    assert agents_that_fit(Numbers(8 * GIB, 9 * GIB, 300), SETTINGS) == 300


@given(
    st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1000), st.integers(0, 1 << 30)
)
def test_more_use_never_makes_more_room(pool: int, used: int, sessions: int, more: int) -> None:
    now = agents_that_fit(Numbers(pool, used, sessions), SETTINGS)
    then = agents_that_fit(Numbers(pool, used + more, sessions), SETTINGS)
    assert sessions <= then <= now <= max(sessions, SETTINGS.agents_max)


def test_the_large_call_is_the_99th_of_100() -> None:
    peaks = ((10.0, 90.0), (20.0, 99.0), (40.0, 100.0), (math.inf, 100.0))
    assert large_call_bytes(peaks) == 20
    assert large_call_bytes(((10.0, 1.0), (math.inf, 100.0))) == 10
    assert large_call_bytes(()) == large_call_bytes(((10.0, 0.0), (math.inf, 0.0))) == 0


def test_the_number_falls_at_once_and_rises_when_it_has_stayed() -> None:
    steady = Steady(rise_after_s=60)
    assert steady.see(20, 0) == 20
    assert steady.see(12, 5) == 12
    assert [steady.see(n, at) for n, at in ((30, 10), (18, 40), (25, 69))] == [12, 12, 12]
    assert steady.see(25, 70) == 18  # the least of that minute
    assert steady.see(25, 71) == 18
    assert steady.see(9, 100) == 9
    assert steady.see(25, 120) == 9  # the minute begins anew


def test_the_daemons_own_metrics_are_read() -> None:
    metrics = Metrics()
    metrics.pool_memory_max.set(8 * GIB)
    metrics.pool_memory_held.set(2 * GIB)
    metrics.sessions_open.labels("important").set(2)
    metrics.sessions_open.labels("batch").set(5)
    metrics.call_peak.observe(100 * MIB)
    numbers = numbers_of(generate_latest(metrics.registry).decode())
    assert (numbers.pool_bytes, numbers.used_bytes, numbers.sessions) == (8 * GIB, 2 * GIB, 7)
    assert large_call_bytes(numbers.peaks) == 128 * MIB


@pytest.mark.parametrize("text", ["", "agentcg_pool_memory_max_bytes NaN\n", "what{ is this"])
def test_missing_numbers_are_an_error(text: str) -> None:
    with pytest.raises(NoNumbers):
        numbers_of(text)
    with pytest.raises(NoNumbers):
        read("http://127.0.0.1:1/metrics")


class ApiServer:
    """An API server that takes patches of a node's status."""

    def __init__(self) -> None:
        self.patches: list[tuple[str, str, str, Any]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                about = self.headers["Authorization"], self.headers["Content-Type"]
                outer.patches.append((self.path, *about, body))
                self.send_response(outer.status)
                self.end_headers()
                self.wfile.write(b'{"message": "because"}')

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.stop()


def test_the_nodes_capacity_is_patched(api: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    Node(api.url, "worker-1", tmp_path).tell(34)
    add = {"op": "add", "path": "/status/capacity/agentcgroup.dev~1agents", "value": "34"}
    assert api.patches == [
        (
            "/api/v1/nodes/worker-1/status",
            "Bearer secret",
            "application/json-patch+json",
            [add],
        )
    ]
    api.status = 403
    with pytest.raises(NotTold, match=r"403.*because"):
        Node(api.url, "worker-1", tmp_path).tell(34)
    with pytest.raises(NotTold):
        Node(api.url, "worker-1", tmp_path / "nothing").tell(34)


def test_outside_of_a_cluster_it_says_so() -> None:
    with pytest.raises(ConfigError, match="NODE_NAME"):
        Node.of_environment({"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": "443"})


def test_only_changes_are_told_and_what_was_not_taken_again() -> None:
    told: list[int] = []
    refuse = True

    def tell(agents: int) -> None:
        if refuse:
            raise NotTold("away")
        told.append(agents)

    metrics = Metrics()
    metrics.pool_memory_max.set(8 * GIB)
    metrics.pool_memory_held.set(0)
    publisher = Publisher(
        lambda: generate_latest(metrics.registry).decode(), tell, SETTINGS, Steady(60)
    )
    publisher.step(0)
    refuse = False
    publisher.step(5)
    publisher.step(10)
    assert told == [16]
    metrics.pool_memory_held.set(6.5 * GIB)
    publisher.step(15)
    publisher.step(15 + AGAIN_S)
    assert told == [16, 4, 4]
