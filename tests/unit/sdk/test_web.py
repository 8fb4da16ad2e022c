"""`agentcg web`: who is answered, what is handed out, and what a browser makes of it."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentcgroup import Admin, Agent, cli
from agentcgroup.cli import web as command
from agentcgroup.cli.live import Look, Rates
from agentcgroup.types import CallInfo, Event, Feedback, PoolInfo, Report, SessionInfo
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.web import server, shown, timeline, watch
from agentcgroup.web.timeline import Memory, Sample
from agentcgroup.web.watch import Watch, unix_usec
from tests.chromium import PROGRAM, Chromium
from tests.harness import wait_until
from tests.unit.fake_daemon import FakeDaemon, running
from tests.unit.sdk import top_scene
from tests.unit.sdk.top_scene import GIB
from tests.unit.sdk.web_scene import EVIL, S, SceneAdmin, report, served, watch_of_scene

DOCS = Path(__file__).parents[3] / "docs"
ASSETS = Path(server.__file__).parent / "assets"
TOKEN = "t" * 43
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server of the scene."""
    with served(watch_of_scene(), TOKEN) as found:
        yield found


def ask(
    address: str, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[http.client.HTTPResponse, bytes]:
    """Ask as a client that knows the token, unless told otherwise."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, headers=BEARER if headers is None else headers)
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


def raw(address: str, data: bytes) -> bytes:
    """Send bytes, and return all that comes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


# Who is answered


@pytest.mark.parametrize("path", ["/api/now", "/api/timeline", "/api/story?call=a", "/api/none"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer " + "u" * 43},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer \xff"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
def test_nothing_is_told_without_the_token(
    address: str, path: str, headers: dict[str, str]
) -> None:
    reply, body = ask(address, path, headers)
    assert reply.status == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
    assert "token" in json.loads(body)["error"] and b"nightly" not in body


def test_the_token_in_the_query_is_no_token(address: str) -> None:
    assert ask(address, f"/api/now?token={TOKEN}", {})[0].status == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1", ""]
)
@pytest.mark.parametrize("path", ["/", "/page.js", "/api/now"])
def test_a_name_that_was_made_to_point_here_is_refused(address: str, host: str, path: str) -> None:
    reply, body = ask(address, path, {**BEARER, "Host": host})
    assert reply.status == 421, host
    assert b"allowed: 127.0.0.1, [::1], localhost" in body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "LOCALHOST:9470", "[::1]:9470"])
def test_any_port_of_loopback_is_taken_for_tunnels(address: str, host: str) -> None:
    assert ask(address, "/api/now", {**BEARER, "Host": host})[0].status == 200


def test_a_request_without_a_host_or_with_two_is_refused(address: str) -> None:
    bearer = f"Authorization: Bearer {TOKEN}\r\n".encode()
    twice = b"Host: localhost\r\nHost: evil.example\r\n"
    for hosts in (b"", twice):
        answer = raw(address, b"GET /api/now HTTP/1.1\r\n" + hosts + bearer + b"\r\n")
        assert b" 421 " in answer.split(b"\r\n")[0]
    assert b"nightly" not in raw(address, b"GET /api/now\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "X"])
def test_nothing_can_be_changed(address: str, method: str) -> None:
    reply, _ = ask(address, "/api/now", method=method)
    assert reply.status == 405 and reply.headers["Allow"] == "GET, HEAD"
    assert reply.headers["Content-Security-Policy"]


def test_head_has_no_body(address: str) -> None:
    reply, body = ask(address, "/", method="HEAD")
    assert reply.status == 200 and int(reply.headers["Content-Length"]) > 500 and not body


@pytest.mark.parametrize(
    "path", ["/../server.py", "/page.html", "/assets/page.js", "/api", "/%2e%2e/x"]
)
def test_there_are_no_other_files(address: str, path: str) -> None:
    assert ask(address, path)[0].status == 404
    assert ask(address, path, {})[0].status == 401


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/timeline?minutes=5", 200),
        ("/api/timeline?minutes=9999", 200),
        ("/api/timeline?minutes=0", 400),
        ("/api/timeline?minutes=-1", 400),
        ("/api/timeline?minutes=1e3", 400),
        ("/api/timeline?minutes=%D9%A1", 400),
        ("/api/timeline?" + "&".join(f"{c}=1" for c in "abcdefghij"), 400),
        ("/api/story?call=" + "c" * 65, 400),
        ("/api/story?call=../x", 400),
        ("/api/story", 400),
        ("/api/story?call=c9", 404),
        ("/api/now?" + "x" * 600, 414),
        ("/api/now?" + "x" * 70000, 414),
    ],
)
def test_what_makes_no_sense_is_refused(address: str, path: str, status: int) -> None:
    assert ask(address, path)[0].status == status


def test_headers_are_bounded(address: str) -> None:
    head = b"GET /api/now HTTP/1.1\r\nHost: localhost\r\n"
    many = b"".join(b"X-%d: 1\r\n" % n for n in range(200))
    assert b" 431 " in raw(address, head + many + b"\r\n").split(b"\r\n")[0]


def test_what_a_client_sends_is_not_repeated(address: str) -> None:
    for line in (b"GET <script> x", b"<script> / HTTP/1.1", b"GET /<script> HTTP/1.1"):
        answer = raw(address, line + b"\r\nHost: localhost\r\n\r\n")
        assert b"<script>" not in answer


def test_answers_may_do_nothing_in_a_browser_but_show_themselves(address: str) -> None:
    for path in ("/", "/page.js", "/page.css", "/api/now", "/none"):
        reply, _ = ask(address, path)
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert "Set-Cookie" not in reply.headers


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in ASSETS.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", text), path
    page = (ASSETS / "page.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"page.css", "page.js"}
    assert "style=" not in page and "onclick" not in page
    script = (ASSETS / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


# How much one client can take


def is_served(found: str) -> bool:
    """Whether there is room for a connection now."""
    try:
        return bool(ask(found, "/")[0].status == 200)
    except (http.client.HTTPException, ConnectionError):
        return False


def test_connections_are_few_and_others_are_served_when_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MOST", 3)
    monkeypatch.setattr(server, "CONNECTION_S", 1.0)
    monkeypatch.setattr(server._Handler, "timeout", 30)
    with served(watch_of_scene(), TOKEN) as found:
        host, port = found.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), 20) for _ in range(3)]
        idle[0].sendall(b"GET / HT")
        before = time.monotonic()
        with socket.create_connection((host, int(port)), 20) as fourth:
            assert fourth.recv(1) == b"", "the fourth is refused at once"
        assert time.monotonic() - before < 10
        for each in idle:
            each.settimeout(20)
            assert each.recv(1) == b"", "one that says nothing is broken off"
            each.close()
        wait_until("there is room", lambda: is_served(found))


def test_one_that_sends_byte_by_byte_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTION_S", 1.0)
    with served(watch_of_scene(), TOKEN) as found:
        host, port = found.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as slow:
            until = time.monotonic() + 60
            with pytest.raises(OSError):
                while time.monotonic() < until:
                    slow.sendall(b"G")
                    time.sleep(0.1)


# What is handed out


def test_now_has_what_top_shows(address: str) -> None:
    document = json.loads(ask(address, "/api/now")[1])
    assert document["daemon"] == {"answers": True, "sentence": "", "since_unix_usec": 0}
    found = document["found"]
    assert [each["id"] for each in found["sessions"]] == [
        "refactor-7",
        "nightly",
        "planner",
        "scratch",
    ]
    assert found["pool"]["calls_paused"] == 2 and found["pool"]["calls_waiting"] == 2
    first, _, _, last = found["stuck"]
    assert (first["name"], first["why"]) == ("python3", "The operator paused it: lunch")
    assert last["why"].startswith("number 2 of 2, expects 1.5 GiB")
    assert found["advice"][0].startswith("1.1 GiB more would let link of refactor-7 begin")


def test_the_timeline_has_memory_calls_and_decisions(address: str) -> None:
    found = json.loads(ask(address, "/api/timeline?minutes=20")[1])
    memory = found["memory"]
    assert memory["sessions"] == ["nightly", "planner", "refactor-7", "scratch"]
    assert memory["points"] and memory["guessed"]
    assert memory["guessed"][-1][0] < memory["points"][0][0]
    times = [point[0] for point in memory["points"]]
    assert times == sorted(times) and len(times) <= timeline.POINTS_MOST + 1
    for _, pool, held in memory["points"]:
        assert len(held) == 5 and sum(held) <= pool
    oom = next(call for call in found["calls"] if call["state"] == "oom_call")
    ((begun, ended, sentence),) = oom["pauses"]
    assert abs(ended - begun - 40 * S) < S and sentence.startswith("Paused: the pool is 92 %")
    kinds = {mark["kind"] for mark in found["marks"]}
    assert kinds == {"pause", "go", "slow", "deny", "end"}
    assert [each["id"] for each in found["ended_sessions"]] == ["review-12", "docs-bot", "triage"]


def test_bars_of_a_lane_are_of_one_session_and_do_not_overlap(address: str) -> None:
    found = json.loads(ask(address, "/api/timeline?minutes=20")[1])
    lanes: dict[int, list[tuple[int, int]]] = {}
    for call in found["calls"]:
        assert found["lanes"][call["lane"]] == call["session_id"]
        end = call["ended_unix_usec"] or found["to_unix_usec"]
        lanes.setdefault(call["lane"], []).append((call["asked_unix_usec"], end))
    for times in lanes.values():
        times.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))


def test_a_shorter_time_has_only_what_is_in_it(address: str) -> None:
    found = json.loads(ask(address, "/api/timeline?minutes=1")[1])
    assert found["to_unix_usec"] - found["from_unix_usec"] == 60 * S
    assert {call["state"] for call in found["calls"]} <= {"running", "frozen", "waiting"}
    assert not found["memory"]["guessed"]


def test_the_story_of_a_call(address: str) -> None:
    found = json.loads(ask(address, f"/api/story?call={0xC1:012x}")[1])
    assert found["state"] == "frozen" and len(found["steps"]) == 3
    assert found["advice"] == ["Give it less to do at once: make -j2."]


def test_text_of_others_is_text_and_short() -> None:
    watched = watch_of_scene(hostile=True)
    for document in (watched.now_json(), watched.timeline_json(20)):
        assert b"\x1b" not in document and "\u202e".encode() not in document
        assert b"</script><img" in document, "it is there, as text of JSON"
    assert shown.text("x" * 1000) == "x" * 299 + "\u2026"
    assert shown.command(["a" * 9, "\n", "b"], "") == "aaaaaaaaa ? b"


def many(number: int) -> Look:
    """A pool of many sessions with two calls each, of which one is paused."""
    sessions, calls = [], []
    for n in range(number):
        use = top_scene.usage((n + 1) << 20, n)
        sessions.append(SessionInfo.from_proto(top_scene.session(f"agent-{n}", 50, use)))
        for call in (2 * n, 2 * n + 1):
            state = {"state": pb.CALL_STATE_FROZEN} if call % 2 else {}
            made = top_scene.call(call, f"agent-{n}", "x" * 4000, use, **state)
            calls.append(CallInfo.from_proto(made))
    pool = PoolInfo.from_proto(pb.Pool(memory_current_bytes=number << 30, memory_max_bytes=1 << 50))
    return Look(pool, sessions, calls, 1.0)


def test_documents_are_bounded_however_many_sessions_there_are() -> None:
    look = many(1000)
    now = watch.encode(shown.now(look, Rates(), 5))
    assert len(now) < 200_000
    found = json.loads(now)
    assert len(found["sessions"]) == 200 and found["sessions_left_out"] == 800
    assert found["sessions"][0]["id"] == "agent-999"
    assert len(found["stuck"]) == 100 and found["stuck_left_out"] == 900
    memory, at = Memory(100), unix_usec()
    for n in range(200):
        memory.samples.append(Sample.of(look, at - n * S))
    for n in range(5000):
        memory.add_report(report(n, f"agent-{n % 50}", "y" * 500, 60 + n % 600, 20, GIB))
    drawn = timeline.document(memory, look, at - 600 * S, at)
    assert len(drawn["lanes"]) <= timeline.LANES_MOST
    assert len(drawn["calls"]) <= timeline.CALLS_DRAWN and drawn["calls_left_out"] > 1000
    assert len(drawn["memory"]["sessions"]) == timeline.SESSIONS_DRAWN
    assert len(memory.samples) == 100 and len(memory.ended) == timeline.CALLS_KEPT
    assert len(watch.encode(drawn)) < 600_000


def test_the_highest_moment_is_never_left_out() -> None:
    memory, at = Memory(5000), unix_usec()
    for n in range(3000):
        held = 9 * GIB if n == 1234 else GIB
        memory.samples.append(Sample(at - (3000 - n) * S, held, {"a": held}))
    drawn = timeline.document(memory, None, at - 3600 * S, at)
    points = drawn["memory"]["points"]
    assert len(points) <= timeline.POINTS_MOST + 1 and max(p[1] for p in points) == 9 * GIB


def test_nonsense_of_a_report_is_drawn_within_bounds() -> None:
    memory, at = Memory(10), unix_usec()
    for number, (began, lasted) in enumerate(((0, 0), (1 << 62, 1 << 62), (at, 1 << 62))):
        made = pb.Report(
            call_id=str(number), session_id="a", began_unix_usec=began, wall_usec=lasted
        )
        memory.add_report(Report.from_proto(made))
    feedback = Feedback.from_proto(
        pb.Feedback(code=pb.FEEDBACK_CODE_FROZEN, at_unix_usec=1 << 62, sentence="far")
    )
    memory.add_marks([timeline.Mark.of("frozen", feedback, "0", "a")])
    drawn = timeline.document(memory, None, at - 60 * S, at)
    assert not drawn["marks"]
    for call in drawn["calls"]:
        assert 0 <= call["asked_unix_usec"] <= call["ended_unix_usec"] < 1 << 54


# The daemon


def look_until(watched: Watch, answers: bool) -> dict[str, Any]:
    def is_so() -> bool:
        watched.look_once()
        return watched.now()["daemon"]["answers"] is answers

    wait_until(f"answers is {answers}", is_so)
    return watched.now()


def test_it_says_that_the_daemon_is_away_and_goes_on_when_it_is_back(daemon: FakeDaemon) -> None:
    with Agent() as agent:
        agent.run(["true"])
    watched = Watch(Admin, 10)
    assert not watched.now()["daemon"]["answers"] and watched.now()["found"] is None
    assert look_until(watched, True)["found"]["pool"]["sessions"] == 1
    daemon.stop()
    away = look_until(watched, False)
    assert away["daemon"]["sentence"] == "The daemon does not answer."
    assert away["daemon"]["since_unix_usec"] > 0
    assert away["found"]["pool"]["sessions"] == 1, "what was seen last stays"
    daemon.start()
    assert look_until(watched, True)["daemon"]["since_unix_usec"] == 0


def test_what_ended_before_is_asked_of_the_store(daemon: FakeDaemon) -> None:
    with Agent() as agent:
        agent.run(["true"])
        agent.run(["false"])
    for made in daemon.reports.values():
        made.began_unix_usec = unix_usec() - 30 * S
    watched = Watch(Admin, 10)
    watched.look_once()
    found = watched.timeline(10)
    assert {call["state"] for call in found["calls"]} == {"ok", "failed"}
    assert [each["id"] for each in found["ended_sessions"]] == ["old"]


def test_what_happens_is_heard(daemon: FakeDaemon) -> None:
    watched = Watch(Admin, 10)
    before = set(threading.enumerate())
    watched.start()
    try:

        def heard() -> bool:
            daemon.say("It was paused.", "c7")
            return bool(watched._memory.marks)

        wait_until("it is heard", heard)
        started = {each.name for each in set(threading.enumerate()) - before}
        assert started >= {"look", "listen"}
    finally:
        watched.close()
    (mark,) = watched._memory.marks.values()
    assert (mark.kind, mark.call_id, mark.sentence) == ("pause", "c7", "It was paused.")
    left = {each.name for each in set(threading.enumerate()) - before}
    assert not left & {"look", "listen"}


def test_what_is_told_twice_is_one_mark() -> None:
    watched = Watch(SceneAdmin, 10)  # type: ignore[arg-type]
    at = unix_usec() // 100_000 * 100_000
    for later, code in ((0, pb.FEEDBACK_CODE_FROZEN), (900, pb.FEEDBACK_CODE_FROZEN)):
        made = pb.Feedback(call_id="a", code=code, at_unix_usec=at + later, sentence="Paused.")
        watched.heard(Event(feedback=Feedback.from_proto(made)))
    assert len(watched._memory.marks) == 1


# The command


def test_the_command_prints_an_address_that_works(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def serve(self: server.Server) -> None:
        thread = threading.Thread(
            target=super(server.Server, self).serve_forever, args=(0.05,), daemon=True
        )
        thread.start()
        printed = capsys.readouterr().out
        address, token = re.findall(r"(http://127\.0\.0\.1:\d+)/#token=(\S{43})\n", printed)[0]
        bearer = {"Authorization": f"Bearer {token}"}
        wait_until(
            "the pool was looked at",
            lambda: json.loads(ask(address, "/api/now", bearer)[1])["found"] is not None,
        )
        found.append(token)
        self.shutdown()

    monkeypatch.setattr(server.Server, "serve_forever", serve)
    for _ in range(2):
        assert cli.main(["web", "--address", "127.0.0.1:0"]) == 0
    assert len(set(found)) == 2, "each run has a token of its own"


def test_json_is_what_the_page_gets(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["web", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["daemon"]["answers"] and found["found"]["sessions"][0]["id"] == "s1"
    assert found["timeline"]["memory"]["points"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--address", "0.0.0.0:80"), "not on loopback"),
        (("--address", "192.0.2.1:80"), "ssh -L"),
        (("--address", "localhost:80"), "no ADDRESS:PORT"),
        (("--address", "127.0.0.1:99999"), "no ADDRESS:PORT"),
        (("--minutes", "0"), "from 1 to 240"),
        (("--allow-host", "a:1"), "without a port"),
    ],
)
def test_wrong_usage_is_said(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert cli.main(["web", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_address_in_use_and_a_refused_socket_are_said(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["web", "--address", f"127.0.0.1:{port}"]) == 1
        assert f"--address: 127.0.0.1:{port} cannot be used" in capsys.readouterr().err
    daemon.operator = False
    assert cli.main(["web", "--address", "127.0.0.1:0"]) == 4


def test_the_sixth_version_of_ip_is_written_in_brackets() -> None:
    assert command._shown("::1", 9470) == "[::1]:9470"
    assert command._address("[::1]:5") == ("::1", 5)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def show(browser: Chromium, address: str) -> None:
    browser.open("about:blank")
    browser.told.clear()
    browser.open(f"{address}/#token={TOKEN}")
    browser.wait_for("document.body && document.body.dataset.drawn")
    browser.value(
        "document.getElementById('minutes').value = '20';"
        "document.getElementById('minutes').dispatchEvent(new Event('change'))"
    )
    browser.wait_for("lastTimeline.to_unix_usec - lastTimeline.from_unix_usec === 20 * 60e6")


if PROGRAM is not None:  # in Debian's package chromium, which is large

    def test_the_page_is_drawn(browser: Chromium, address: str, tmp_path: Path) -> None:
        """With AGENTCG_PICTURES=1 the pictures in docs/ are taken anew; look at them."""
        pictures = DOCS if os.environ.get("AGENTCG_PICTURES") == "1" else tmp_path
        browser.dark(False)
        for name, width, height in (("web.png", 1280, 1110), ("web-phone.png", 390, 844)):
            browser.size(width, height)
            show(browser, address)
            assert not browser.told
            assert browser.value("location.href") == f"{address}/", "the token is out of sight"
            assert browser.value("document.documentElement.scrollWidth") <= width
            seen = browser.value("document.body.innerText")
            assert "refactor-7" in seen and "1.1 GiB more would let link" in seen
            assert "pytest of planner is more important" in seen
            browser.picture(pictures / name)
            assert (pictures / name).stat().st_size > 20_000

    def test_whoever_points_at_something_reads_its_sentence(
        browser: Chromium, address: str
    ) -> None:
        browser.size(1280, 1060)
        show(browser, address)
        x, y = browser.value(
            "(() => { const mark = document.querySelector('#timeline .m-slow');"
            "const b = mark.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        browser.point(x, y)
        browser.wait_for("!document.getElementById('tip').hidden")
        assert "It is slowed: near its limit." in browser.value(
            "document.getElementById('tip').innerText"
        )

    def test_names_are_never_markup_in_a_browser(browser: Chromium) -> None:
        browser.size(1280, 1060)
        with served(watch_of_scene(hostile=True), TOKEN) as address:
            show(browser, address)
            assert EVIL[:13] in browser.value("document.body.innerText")
            browser.value(f"tell('{0xC1:012x}')")
            browser.wait_for("document.getElementById('story').open")
            assert EVIL[:13] in browser.value("document.getElementById('story').innerText")
            assert browser.value("document.title") == "agentcg"
            assert browser.value("document.querySelectorAll('img, b:not(#legend b)').length") == 0
            assert not browser.told

    def test_a_page_without_the_token_or_the_server_says_so(browser: Chromium) -> None:
        browser.size(1280, 800)
        with served(watch_of_scene(), TOKEN) as address:
            browser.open(f"{address}/#token=wrong")
            browser.wait_for("document.body && !document.getElementById('trouble').hidden")
            assert "open the address" in browser.value(
                "document.getElementById('trouble').innerText"
            )
            assert browser.value("document.getElementById('main').hidden")
            show(browser, address)
        browser.wait_for("!document.getElementById('trouble').hidden")
        assert "does not answer" in browser.value("document.getElementById('trouble').innerText")
        assert not browser.value("document.getElementById('main').hidden"), "what was seen stays"
