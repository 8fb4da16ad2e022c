"""What labels and rules make of a container."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.config import load_config
from agentcgroupd.config_containers import LABEL_FIELDS, ContainerRule
from agentcgroupd.errors import ConfigError
from agentcgroupd.runtime.labels import Container, other_id, session_id, wanted, wish_of
from agentcgroupd.sessions.cgroups import _ID

ID = "0123456789abcdef" * 4
RULES = (
    ContainerRule(image="agents/*", labels={"priority": "batch", "memory-max": "2G"}),
    ContainerRule(name="web-*", labels={"priority": "important"}),
)


def container(labels: dict[str, str], name: str = "My_Web.1", image: str = "box") -> Container:
    return Container("docker", ID, name, image, 1, labels)


def test_a_container_without_labels_is_no_session() -> None:
    assert wish_of(container({"maintainer": "me"}), ()) is None
    assert wish_of(container({"agentcgroup.priority": "batch"}), ()) is None
    assert wish_of(container({"agentcgroup.session": "false"}, image="agents/x"), RULES) is None


@pytest.mark.parametrize(
    ("label", "expected"),
    [("true", "my_web.1"), ("", "my_web.1"), ("web", "web"), ("Team A/1", "team-a-1")],
)
def test_the_session_is_named_by_the_label_or_after_the_container(
    label: str, expected: str
) -> None:
    wish = wish_of(container({"agentcgroup.session": label}), ())
    assert wish is not None and wish.spec.id == expected


def test_labels_are_limits_and_what_means_nothing_is_said() -> None:
    labels = {
        "agentcgroup.session": "a",
        "agentcgroup.memory": "1G",
        "agentcgroup.cpu-max": "1.5",
        "agentcgroup.exec-is-call": "true",
        "agentcgroup.priorty": "batch",
        "agentcgroup.gpu": "1" * 300,
    }
    wish = wish_of(container(labels), ())
    assert wish is not None
    assert (wish.spec.memory_low, wish.spec.cpu_max, wish.spec.gpu) == ("1G", "1.5", "")
    assert wish.spec.exec_is_call == "yes"
    assert len(wish.ignored) == 2
    assert "'agentcgroup.priorty'" in wish.ignored[0] and "256" in wish.ignored[1]


def test_the_first_rule_that_fits_gives_labels_and_the_containers_own_win() -> None:
    wish = wish_of(container({}, name="web-1", image="agents/coder:2"), RULES)
    assert wish is not None
    assert (wish.spec.id, wish.spec.priority, wish.spec.memory_max) == ("web-1", "batch", "2G")
    own = {"agentcgroup.session": "x", "agentcgroup.priority": "normal"}
    wish = wish_of(container(own, name="web-1"), RULES)
    assert wish is not None and (wish.spec.id, wish.spec.priority) == ("x", "normal")


def test_an_event_is_enough_to_know_whether_a_container_may_be_one() -> None:
    assert wanted({"agentcgroup.session": "a"}, "n", "i", ())
    assert wanted({}, "web-7", "i", RULES) and wanted({}, "n", "agents/a", RULES)
    assert not wanted({"agentcgroup.memory": "1G"}, "n", "i", RULES)


@given(st.text(max_size=200), st.text(alphabet="0123456789abcdefABCDEF", min_size=12, max_size=64))
def test_every_name_makes_an_id_that_a_session_may_have(name: str, number: str) -> None:
    made = session_id(name)
    assert _ID.fullmatch(made)
    assert _ID.fullmatch(other_id(made, number)) and other_id(made, number) != made


def test_a_rule_with_a_label_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agentcgroupd.toml"
    path.write_text('[[containers.rules]]\nimage = "a"\nlabels = { memry = "1G" }\n')
    with pytest.raises(ConfigError, match="memory-max"):
        load_config(path)
    path.write_text('[[containers.rules]]\nimage = "a"\nlabels = { memory-max = "1G" }\n')
    assert load_config(path).containers.rules[0].labels == {"memory-max": "1G"}


def test_each_label_is_explained() -> None:
    page = Path(__file__).parents[3].joinpath("docs/containers.md").read_text()
    for name in LABEL_FIELDS:
        assert f"`agentcgroup.{name}`" in page


def test_the_rules_of_the_page_can_be_configured(tmp_path: Path) -> None:
    page = Path(__file__).parents[3].joinpath("docs/containers.md").read_text()
    rules, _ = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "agentcgroupd.toml"
    path.write_text(rules)
    found = load_config(path).containers.rules
    coder = wish_of(Container("docker", "ab" * 32, "web", "agents/coder:2", 1, {}), found)
    reviewer = wish_of(Container("docker", "ab" * 32, "reviewer-1", "other", 1, {}), found)
    assert coder is not None and coder.spec.memory_max == "2G" and coder.spec.priority == "batch"
    assert reviewer is not None and reviewer.spec.priority == "important"


def test_a_rule_need_not_have_labels(tmp_path: Path) -> None:
    path = tmp_path / "agentcgroupd.toml"
    path.write_text('[[containers.rules]]\nimage = "agents/*"\n')
    assert load_config(path).containers.rules[0].labels == {}
    container = Container("docker", "ab" * 32, "web", "agents/coder", 1, {})
    wish = wish_of(container, load_config(path).containers.rules)
    assert wish is not None and wish.spec.id == "web"


def test_labels_of_the_session_itself() -> None:
    labels = {
        "agentcgroup.session": "a",
        "agentcgroup.label.team": "web",
        "agentcgroup.label.app.kubernetes.io/name": "shop",
        "agentcgroup.label.": "nothing",
        "agentcgroup.label.long": "x" * 64,
    }
    wish = wish_of(container(labels), ())
    assert wish is not None
    assert dict(wish.spec.labels) == {"team": "web", "app.kubernetes.io/name": "shop"}
    nameless, long = wish.ignored
    assert "key of a label" in nameless and "label[long]" in long
    many = {"agentcgroup.session": "a", **{f"agentcgroup.label.k{n}": "v" for n in range(20)}}
    wish = wish_of(container(many), ())
    assert wish is not None and len(wish.spec.labels) == 16
    assert len(wish.ignored) == 4 and "17 labels" in wish.ignored[0]


def test_rules_and_annotations_may_name_labels_of_sessions(tmp_path: Path) -> None:
    path = tmp_path / "agentcgroupd.toml"
    path.write_text(
        '[containers]\nannotations = ["session", "label.team"]\n'
        '[[containers.rules]]\nimage = "agents/*"\nlabels = { "label.team" = "web" }\n'
    )
    config = load_config(path).containers
    assert config.annotations == ("session", "label.team")
    wish = wish_of(container({}, image="agents/x"), config.rules)
    assert wish is not None and dict(wish.spec.labels) == {"team": "web"}
    path.write_text('[containers]\nannotations = ["label.a=b"]\n')
    with pytest.raises(ConfigError, match="'a=b' cannot be used; allowed is 1 to 63 letters"):
        load_config(path)
