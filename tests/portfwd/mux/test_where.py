"""Ways to the forwarder as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from portfwd.mux.where import FIRST_CID, Where

TEXTS = {
    "hyperkit:/vm/connect": "hyperkit:/vm/connect,cid=3,port=62372,generation=3",
    "hyperkit:/vm/connect,generation=2": "hyperkit:/vm/connect,cid=3,port=62373,generation=2",
    "hyperkit:/vm/connect,cid=7,port=5,generation=1": "hyperkit:/vm/connect,cid=7,port=5,generation=1",
    "connect:/vm/v.sock,port=99": "connect:/vm/v.sock,port=99,generation=3",
    "unix:/run/a,b:c.sock": "unix:/run/a,b:c.sock,generation=3",
    "listen:/run/data.sock,generation=2": "listen:/run/data.sock,generation=2",
    "fd:5": "fd:5,generation=3",
}


@pytest.mark.parametrize(("text", "full"), TEXTS.items(), ids=TEXTS)
def test_forms_and_their_defaults(text: str, full: str) -> None:
    assert str(Where.parse(text)) == full
    assert Where.parse(full) == Where.parse(text)


def wheres() -> st.SearchStrategy[Where]:
    def made(kind: str, path: str, generation: int, number: int) -> Where | None:
        try:
            if kind == "fd":
                return Where(kind=kind, fd=number, generation=generation)
            ports = {"port": number} if kind in ("hyperkit", "connect") else {}
            cids = {"cid": number + FIRST_CID} if kind == "hyperkit" else {}
            return Where(kind=kind, path=path, generation=generation, **ports, **cids)
        except ConfigError:
            return None

    kinds = st.sampled_from(["hyperkit", "connect", "unix", "listen", "fd"])
    paths = st.one_of(st.text(), st.from_regex(r"/[a-z,=:.]{0,8}(,port=[a-z0-9]?)?", fullmatch=True))
    return st.builds(made, kinds, paths, st.integers(1, 3), st.integers(0, 70_000)).filter(bool)  # type: ignore[return-value]


@given(wheres())
def test_the_text_and_the_value_are_inverses(where: Where) -> None:
    assert Where.parse(str(where)) == where


@given(
    st.one_of(st.text(), st.from_regex(r"(hyperkit|connect|unix|listen|fd|vsock):?[/a5]*(,[a-z]{1,10}=\d{0,3}){0,3}"))
)
def test_any_text_is_a_way_or_a_clear_error(text: str) -> None:
    try:
        where = Where.parse(text)
    except ConfigError as error:
        assert str(error).startswith("forwarder: ")
    else:
        assert Where.parse(str(where)) == where


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begins with no kind"),
        ("/vm/connect", "begins with no kind"),
        ("vsock:3", "'vsock' is no way"),
        ("unix:", "a path is missing"),
        ("unix:/a,port=3", "unix takes no port"),
        ("connect:/a,cid=3", "connect takes no cid"),
        ("hyperkit:/a,cid=2", "a cid 3 to"),
        ("hyperkit:/a,port=0", "a port is 1 to"),
        ("hyperkit:/a,port=x", "no number"),
        ("hyperkit:/a,port=1,port=2", "given twice"),
        ("hyperkit:/a,port=4294967296", "a port is 1 to"),
        ("unix:/a,generation=4", "no generation 4"),
        ("fd:x", "a descriptor is a number"),
        ("fd:-1", "a descriptor is a number"),
        ("listen:/a,generation=1", "a connection for each client"),
        ("fd:3,generation=1", "a connection for each client"),
    ],
)
def test_what_is_wrong_is_said(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Where.parse(text)


def test_vpnkits_own_option_means_hyperkit_and_generation_2() -> None:
    for text in ("/state/connect", "unix:///state/connect"):
        assert str(Where.vsock_path(text)) == "hyperkit:/state/connect,cid=3,port=62373,generation=2"
