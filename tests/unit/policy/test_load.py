"""Policies from files: built-in ones, errors with their lines, drop-ins, differences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.config import Section
from agentcgroupd.errors import ConfigError
from agentcgroupd.policy.errors import ACTIONS, DETECTORS, PolicyError
from agentcgroupd.policy.lint import lint
from agentcgroupd.policy.load import built_in, load_policy, parse_policy
from agentcgroupd.policy.schema import Amount, Freeze, Growing, Policy, PoolFree, Ruleset
from agentcgroupd.policy.toml import diff, to_toml

ROOT = Path(__file__).resolve().parents[3]
DOC = (ROOT / "docs/policies.md").read_text()
RULE = '[[rulesets]]\nname = "a"\n'
WHEN = 'when = [{ detector = "growing", above = "1M" }]\n'
FREEZE = f'{WHEN}do = {{ action = "freeze" }}\n'
KILL = f'{WHEN}do = {{ action = "kill" }}\n'


def test_no_file_is_the_default() -> None:
    loaded = load_policy(None)
    assert loaded == load_policy(Path("default"))
    assert loaded.policy.name == "default"
    assert [p.name for p in loaded.sources] == ["default.toml"]
    assert loaded.warnings == ()


@pytest.mark.parametrize("name", ["default", "batch-farm", "workstation"])
def test_built_in_policies_are_usable_as_they_are(name: str) -> None:
    loaded = load_policy(Path(name), limit_bytes=8 << 30)
    assert (loaded.policy.name, loaded.warnings) == (name, ())
    assert parse_policy(loaded.text) == loaded.policy
    assert set(built_in()) == {"default", "batch-farm", "workstation"}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = [\n1,\n", 3, "it is not TOML: Invalid value"),
        ('name = "A B"', 1, "name: 'A B' cannot be used; allowed is 1 to 63 small letters"),
        ("\n[headrom]\n", 2, "headrom: no such key; did you mean 'headroom'?"),
        ("[headroom]\n\nlese = 3", 3, "headroom.lese: no such key; did you mean 'lease'?"),
        ("[headroom]\n\nx = 3", 3, "headroom.x: no such key; known are lookahead, leader_share"),
        ("[headroom]\nlease = ''", 2, "headroom.lease: '' cannot be used"),
        ("[headroom]\nlease = '5 years'", 2, "allowed is a time such as 90, 1.5s"),
        ("[headroom]\nleader_share = 1.5", 2, "1.5 cannot be used; allowed is 1 or less"),
        ("[headroom]\nleader_most = 3", 2, "allowed is a part of the pool such as 6%"),
        ("headroom = 1", 1, "headroom: 1 cannot be used; allowed is a table"),
        ("[cpu]\nbatch_below = 90", 2, "cpu.batch_below: '90' cannot be used; allowed is at most"),
        ("rulesets = 3", 1, "rulesets: 3 cannot be used; allowed is an array"),
        ("rulesets = [3]", 1, "rulesets[0]: 3 cannot be used; allowed is a table"),
        (f"\n{RULE}{WHEN}", 2, "rulesets.a.do: it is missing"),
        (f"{RULE}when = []\ndo.action = 'kill'", 3, "rulesets.a.when: [] cannot be used"),
        (f"{RULE}{WHEN}\ndo = {{}}", 5, "rulesets.a.do.action: it is missing; allowed is reclaim,"),
        (f"{RULE}{WHEN}do.action = 'frezze'", 4, "did you mean 'freeze'?"),
        (
            f"{RULE}{WHEN}do = {{ action = 'deny', whom = 'al' }}",
            4,
            "rulesets.a.do.whom: 'al' cannot be used; allowed is willing, all; did you mean 'all'?",
        ),
        (f"{RULE}{WHEN}do.action = 'slow'\ndo.percnt = 3", 5, "did you mean 'percent'?"),
        (f"{RULE}{FREEZE}spare_priority = 102", 5, "allowed is a whole number from 0 to 100"),
        (
            f"{RULE}do.action = 'kill'\nwhen = [\n\n {{ detector = 'growing', above = 4 }} ]",
            6,
            "rulesets.a.when[0].above: '4' cannot be used",
        ),
        (
            f"{RULE}do.action = 'kill'\nwhen = [\n # two\n {{ detector = 'grwing' }} ]",
            6,
            "rulesets.a.when[0].detector: 'grwing' cannot be used; allowed is pool_free, "
            "pool_fills",
        ),
        (
            f"{RULE}do.action = 'kill'\n[[rulesets.when]]\ndetector = 'growing'\n\nabov = '4M'",
            7,
            "rulesets.a.when[0].abov: no such key; did you mean 'above'?",
        ),
        (
            f"{RULE}do.action = 'kill'\n[[rulesets.when]]\ndetector = 'pool_free'\nbelow = '6%'\n"
            "until = '5%'",
            7,
            "rulesets.a.when[0].until: '5%' cannot be used; allowed is at least below, which is 6%",
        ),
        (f"{RULE}{FREEZE}\n{RULE}{FREEZE}", 7, "rulesets.a.name: 'a' cannot be used; allowed is"),
        (
            f"{RULE}{KILL}\n[[rulesets]]\nname = 'b'\n{FREEZE}",
            1,
            "rulesets.a: 'a' cannot be used; allowed is an order in which kill comes after 'b'",
        ),
    ],
)
def test_errors_are_named_with_their_line(text: str, line: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    first = caught.value.errors[0]
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert (first.file, first.line) == (str(path), line)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_all_errors_are_named_in_the_order_of_their_lines() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(f"nme = 1\n{RULE}foo = 1\n{WHEN}do = {{ action = 'slow', above = 2 }}", "f")
    assert [(m.line, m.key) for m in caught.value.errors] == [
        (1, "nme"),
        (4, "rulesets.a.foo"),
        (6, "rulesets.a.do.above"),
    ]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def fails(path: Path, words: str) -> None:
        with pytest.raises(PolicyError, match=words):
            load_policy(path)

    bad = tmp_path / "bad.toml"
    fails(bad, r"bad\.toml: cannot be read: No such file")
    fails(tmp_path, r"cannot be read: Is a directory")
    bad.write_bytes(b"name = 'a'\n# \xff")
    fails(bad, r"bad\.toml:2: it is not UTF-8")
    bad.write_text(f"x = {'[' * 5000}{']' * 5000}")
    fails(bad, r"bad\.toml: keys or values lie more than 20 levels deep")
    bad.write_bytes(b"#" * ((1 << 20) + 1))
    fails(bad, r"bad\.toml: cannot be used: allowed are 1 MiB")
    fails(Path("defalt"), "there is no such policy; .* did you mean 'default'?")


# Text

AMOUNTS = st.one_of(
    st.floats(0.1, 100).map(lambda p: Amount(percent=p)),
    st.integers(1 << 20, 1 << 40).map(lambda b: Amount(size_bytes=b)),
)


TIMES_USEC = st.integers(1000, 30 * 86400 * 10**6)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, AMOUNTS, TIMES_USEC, st.floats(1, 100), st.booleans())
def test_a_written_policy_reads_as_the_same(
    text: str, amount: Amount, usec: int, number: float, flag: bool
) -> None:
    policy = load_policy(None).policy
    rulesets = (
        Ruleset(
            name="x",
            description=text,
            dry_run=flag,
            do=Freeze(action="freeze"),
            when=(
                Growing(detector="growing", above=amount),
                PoolFree(detector="pool_free", below=amount, until=amount),
            ),
        ),
        *(r.model_copy(update={"cooldown": usec}) for r in policy.rulesets),
    )
    admission = policy.admission.model_copy(update={"overcommit": number, "wait": usec})
    changes = {
        "description": text,
        "rulesets": rulesets,
        "dry_run": flag,
        "admission": admission,
    }
    changed = policy.model_copy(update=changes)
    assert parse_policy(to_toml(changed)) == changed
    assert diff(changed, parse_policy(to_toml(changed))) == []


def test_differences_are_told_key_by_key() -> None:
    before = parse_policy(f"{RULE}{FREEZE}[[rulesets]]\nname='b'\n{FREEZE}", "f")
    after = parse_policy(
        f"[headroom]\nlease='5m'\n[[rulesets]]\nname='b'\n{FREEZE}cooldown='1s'\n"
        f"{RULE}{FREEZE.replace('1M', '2M')}[[rulesets]]\nname='c'\n{KILL}",
        "f",
    )
    assert list(map(str, diff(before, after))) == [
        "headroom.lease: 2m -> 5m",
        "rulesets.a.when[0].above: 1M -> 2M",
        "rulesets.b.cooldown: added: 1s",
        "rulesets.c: added: kill when growing (above 1M)",
        "order of rulesets: a, b -> b, a",
    ]
    assert str(diff(after, before)[3]) == "rulesets.c: removed, was: kill when growing (above 1M)"


def freeze_at(below: str, until: str) -> str:
    """A document with one ruleset, which freezes calls between two amounts of free memory."""
    when = f'[{{ detector = "pool_free", below = "{below}", until = "{until}" }}]'
    return f'{RULE}when = {when}\ndo = {{ action = "freeze" }}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are none"),
        (f"{RULE}{FREEZE}enabled = false", "all are disabled"),
        (f"{RULE}{FREEZE}", "none ends a call"),
        (f"{RULE}{KILL}", "none freezes calls"),
        (
            freeze_at("9G", "9G"),
            "below: 9 GiB is all of the pool of 1 GiB",
        ),
        (
            freeze_at("5%", "9G"),
            "until: 9 GiB is all of the pool of 1 GiB",
        ),
        (
            freeze_at("50%", "5M"),
            "until: 5 MiB is less than below (50%)",
        ),
        (
            freeze_at("0.1%", "5M"),
            None,
        ),
    ],
)
def test_what_is_legal_but_odd_is_a_warning(text: str, words: str | None) -> None:
    found = list(lint(parse_policy(text), 1 << 30))
    if words is None:
        assert not any("below" in sentence for sentence in found)
    else:
        assert any(words in sentence for sentence in found), found


# Drop-ins


def lay(tmp_path: Path, base: str, **drop_ins: str) -> Policy:
    """The policy of a document and drop-ins by name."""
    directory = tmp_path / "d"
    directory.mkdir(exist_ok=True)
    (tmp_path / "base.toml").write_text(base)
    for name, text in drop_ins.items():
        (directory / f"{name}.toml").write_text(text)
    return load_policy(tmp_path / "base.toml", directory).policy


def test_drop_ins_say_only_what_is_different(tmp_path: Path) -> None:
    base = f"[headroom]\nlease='5m'\nlookahead='1s'\n{RULE}description='x'\n{FREEZE}"
    slow = "do = { action = 'slow', percent = 30, above = 0.5 }"
    base += f"[[rulesets]]\nname='s'\n{WHEN}{slow}\n[[rulesets]]\nname='k'\n{KILL}"
    policy = lay(
        tmp_path,
        base,
        a=f"[headroom]\nlease='6m'\n{RULE}spare_priority='important'\n",
        b=f"[headroom]\nlease='7m'\n[[rulesets]]\nname='s'\ndo.percent=10\n"
        f"[[rulesets]]\nname='n'\nbefore='k'\n{FREEZE}[[rulesets]]\nname='k2'\n{KILL}",
        c="[[rulesets]]\nname='a'\ndo = { action = 'deny' }\n",
    )
    assert (policy.headroom.lease, policy.headroom.lookahead) == (420_000_000, 1_000_000)
    assert [r.name for r in policy.rulesets] == ["a", "s", "n", "k", "k2"]
    first, second = policy.rulesets[:2]
    assert (first.description, first.spare_priority, first.do.action) == ("x", 80, "deny")
    assert second.do == ACTIONS["slow"](action="slow", percent=10, above=0.5)  # type: ignore[call-arg]


def test_other_files_beside_drop_ins_are_passed_over(tmp_path: Path) -> None:
    lay(tmp_path, RULE + FREEZE, a="name = 'b'")
    for name in (".hidden.toml", "a.toml~", ".a.toml.swp", "b.toml.bak", "#a.toml#", "README"):
        (tmp_path / "d" / name).write_text("not TOML")
    loaded = load_policy(tmp_path / "base.toml", tmp_path / "d")
    assert [p.name for p in loaded.sources] == ["base.toml", "a.toml"]
    assert load_policy(tmp_path / "base.toml", tmp_path / "none").policy.name == "unnamed"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("\nnme = 1", "1.toml:2", "nme: no such key"),
        (f"{RULE}foo = 1", "1.toml:3", "rulesets.a.foo: no such key"),
        (f"{RULE}{WHEN.replace('1M', '1')}", "1.toml:3", "rulesets.a.when[0].above"),
        (f"{RULE}[[rulesets]]\nname = 'a'", "1.toml:4", "allowed is each name once"),
        ("\n[[rulesets]]\nname = 'n'", "1.toml:2", "rulesets.n.when: it is missing"),
        (
            f"[[rulesets]]\nname = 'n'\nbefore = 'b'\n{FREEZE}",
            "1.toml:3",
            "rulesets.n.before: 'b' cannot be used; allowed is the name of another ruleset",
        ),
        ("rulesets = 1", "1.toml:1", "rulesets: 1 cannot be used; allowed is an array"),
        ("rulesets = [1]", "1.toml:1", "rulesets[2]: 1 cannot be used; allowed is a table"),
        (f"[[rulesets]]\nname = 'n'\n{FREEZE}", "base.toml:5", "kill comes after 'n'"),
        (f"{RULE}before = 'k'\nwhen = 1", "1.toml:4", "rulesets.a.when: 1 cannot be used"),
    ],
)
def test_errors_in_drop_ins_are_named_there(
    text: str, place: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError) as caught:
        lay(tmp_path, f"{RULE}{FREEZE}[[rulesets]]\nname = 'k'\n{KILL}", **{"1": text})
    assert place in str(caught.value) and words in str(caught.value)


def test_before_belongs_into_drop_ins_only() -> None:
    with pytest.raises(PolicyError, match=r"rulesets\.a\.before: no such key"):
        parse_policy(f"{RULE}before = 'b'\n{FREEZE}")


# docs/policies.md


def _keys(model: type[Section], prefix: str) -> set[str]:
    found = set()
    for name, info in model.model_fields.items():
        found.add(f"{prefix}{name}")
        parts = () if name in ("do", "when") else (info.annotation, *get_args(info.annotation))
        for part in parts:
            if isinstance(part, type) and issubclass(part, Section):
                found |= _keys(part, f"{name}.")
    return found


def test_every_key_is_documented() -> None:
    keys = _keys(Policy, "") - {"headroom", "admission", "cpu", "learning"}
    for tag, model in {**DETECTORS, **ACTIONS}.items():
        keys |= _keys(model, f"{tag}.")
    documented = set(re.findall(r"^\| `([a-z_.]+)` \|", DOC, re.MULTILINE))
    assert keys - documented == set()
    assert documented - keys - set(ACTIONS) - {"default", "batch-farm", "workstation"} == set()


def test_examples_in_the_documentation_are_valid(tmp_path: Path) -> None:
    examples = re.findall(r"^```toml\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    for text in examples:
        if text.startswith("# /etc/agentcgroup/policy.d/"):
            (tmp_path / "50-ours.toml").write_text(text)
            policy = load_policy(None, tmp_path).policy
            assert [r.name for r in policy.rulesets][-8:] == [
                "deny-all",
                "freeze",
                "deny-fast",
                "freeze-fast",
                "kill",
                "kill-stalled",
                "share-disks",
                "hold-disks",
            ]
        else:
            parse_policy(text)
