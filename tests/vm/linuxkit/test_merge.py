"""What an image's label gives its container, and which numbers names stand for (spec companions 3.1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError
from vm.linuxkit.load import load
from vm.linuxkit.merge import capabilities, ids, label, merged, number
from vm.linuxkit.schema import BindNamespaces, Image, ImageConfig, Runtime
from vm.linuxkit.values import CAPABILITIES

DOCKER_VM = Path(__file__).with_name("docker_vm.yml")


def image(**fields: Any) -> Image:
    return Image(name="one", image="example/one:v1", **fields)


def test_a_label_speaks_where_the_yaml_is_silent() -> None:
    defaults = label('{"net": "host", "binds": ["/etc/x:/etc/x"], "readonly": true, "oomScoreAdj": -5}', "example/one")
    found = merged(image(net="new"), defaults)
    assert (found.net, found.binds, found.readonly, found.oom_score_adj) == ("new", ("/etc/x:/etc/x",), True, -5)
    assert (found.name, found.image) == ("one", "example/one:v1")


def test_a_field_of_the_yaml_replaces_that_of_the_label_whole() -> None:
    defaults = label({"capabilities": ["CAP_SYS_ADMIN"], "sysctl": {"a": "1"}, "env": ["A=1"]}, "example/one")
    found = merged(image(capabilities=("CAP_KILL",), sysctl={"b": "2"}, env=()), defaults)
    assert (found.capabilities, found.sysctl, found.env) == (("CAP_KILL",), {"b": "2"}, ())


@pytest.mark.parametrize(
    ("ours", "theirs", "binds"),
    [
        pytest.param({"binds_add": ("/c:/c",)}, {"binds": ["/a:/a"]}, ("/a:/a", "/c:/c"), id="to the label's"),
        pytest.param(
            {"binds": ("/b:/b",), "binds_add": ("/c:/c",)}, {"binds": ["/a:/a"]}, ("/b:/b", "/c:/c"), id="to ours"
        ),
        pytest.param({"binds_add": ("/c:/c",)}, {}, ("/c:/c",), id="to nothing"),
        pytest.param({"binds_add": ("/a:/a",)}, {"binds": ["/a:/a"]}, ("/a:/a",), id="once"),
        pytest.param({"binds": ("/b:/b",)}, {"binds.add": ["/d:/d"]}, ("/b:/b", "/d:/d"), id="the label adds"),
        pytest.param({}, {}, None, id="nobody says anything"),
        pytest.param({"binds": ()}, {"binds": ["/a:/a"]}, (), id="ours is empty"),
    ],
)
def test_add_adds(ours: dict[str, Any], theirs: dict[str, Any], binds: tuple[str, ...] | None) -> None:
    found = merged(image(**ours), label(theirs, "example/one"))
    assert found.binds == binds
    assert found.binds_add is None


def test_capabilities_are_added_to_what_the_image_has() -> None:
    found = merged(image(capabilities_add=("CAP_SYS_TIME",)), label({"capabilities": ["CAP_KILL"]}, "example/one"))
    assert (found.capabilities, found.capabilities_add) == (("CAP_KILL", "CAP_SYS_TIME"), None)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ()),
        (("none",), ()),
        (("CAP_KILL",), ("CAP_KILL",)),
        (("all",), CAPABILITIES),
        (("CAP_KILL", "all"), CAPABILITIES),
    ],
)
def test_all_and_none_are_taken_at_their_word(given: tuple[str, ...] | None, names: tuple[str, ...]) -> None:
    assert capabilities(given) == names


def test_a_capability_is_found_by_its_number() -> None:
    # capabilities(7): <linux/capability.h>
    assert (CAPABILITIES[0], CAPABILITIES[12], CAPABILITIES[21], CAPABILITIES[40]) == (
        "CAP_CHOWN",
        "CAP_NET_ADMIN",
        "CAP_SYS_ADMIN",
        "CAP_CHECKPOINT_RESTORE",
    )
    assert len(CAPABILITIES) == 41


def test_runtime_is_merged_field_by_field() -> None:
    ours = Runtime(mkdir=("/a",), bind_ns=BindNamespaces(net="/run/n"))
    theirs = {"runtime": {"mkdir": ["/b"], "cgroups": ["systemreserved"], "bindNS": {"net": "/x", "uts": "/y"}}}
    found = merged(image(runtime=ours), label(theirs, "example/one")).runtime
    assert found == Runtime(mkdir=("/a",), cgroups=("systemreserved",), bind_ns=BindNamespaces(net="/run/n", uts="/y"))


def test_a_label_may_have_keys_that_are_not_known_here() -> None:
    assert label({"seccomp": "x", "pid": "host"}, "example/one") == ImageConfig(pid="host")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "example/one: label org.mobyproject.config: is no JSON"),
        ("[" * 100000, "is no JSON"),
        ("[]", "a mapping of keys to values is wanted"),
        ('{"net": 1}', "org.mobyproject.config.net: '1' without quotes is no text"),
        ('{"readonly": "true"}', "'true' is neither true nor false"),
        ('{"binds": [null]}', "'null' without quotes is no text but nothing"),
        (json.dumps({"annotations": {"a": "\ud83d\ude00"}, "oomScoreAdj": 2000}), "2000 is out of range"),
    ],
)
def test_a_bad_label_names_the_image(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        label(text, "example/one")
    assert str(caught.value).startswith("example/one: label org.mobyproject.config: ")
    assert complaint in str(caught.value)


def test_names_stand_for_numbers_from_a_hundred_in_the_order_of_the_file() -> None:
    machine = load(DOCKER_VM)
    names = ids(machine)
    assert names["root"] == 0
    assert [names[one] for one in ("metadata", "sysctl", "farewell", "acpid")] == [100, 101, 111, 112]
    web = next(one for one in machine.services if one.name == "web")
    assert (number(web.uid, names), number(web.gid, names), number(None, names)) == (113, 82, 0)
    with pytest.raises(ConfigError, match="no container is named 'who'"):
        number("who", names)
