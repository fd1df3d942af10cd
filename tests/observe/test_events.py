"""Events reach who asked for them, and nobody can harm the network by listening."""

from __future__ import annotations

import logging

import pytest

from netstack.observe.events import Event, EventBus, FlowRefused, LinkUp, as_dict

UP = LinkUp(time=1.0, link="qemu:/net.sock")
REFUSED = FlowRefused(time=2.0, protocol="tcp", guest="192.168.65.3:1", remote="127.0.0.1:2", reason="policy")


def test_flow_events_go_to_those_who_want_them() -> None:
    bus, all_of_them, without_flows = EventBus(), list[Event](), list[Event]()
    assert not bus.wanted
    stop = bus.subscribe(all_of_them.append)
    bus.subscribe(without_flows.append, flows=False)
    assert bus.wanted
    bus.emit(UP)
    bus.emit(REFUSED)
    assert all_of_them == [UP, REFUSED]
    assert without_flows == [UP]
    stop()
    assert not bus.wanted, "flow events are not even made for those who do not read them"
    bus.emit(UP)
    assert (len(all_of_them), len(without_flows)) == (2, 2)


def test_a_subscriber_may_change_its_mind() -> None:
    bus, seen = EventBus(), list[Event]()
    bus.subscribe(seen.append, flows=False)
    bus.subscribe(seen.append)
    bus.emit(REFUSED)
    assert seen == [REFUSED]


def test_a_subscriber_that_fails_is_removed_and_the_others_hear_all(caplog: pytest.LogCaptureFixture) -> None:
    bus, seen = EventBus(), list[Event]()

    def broken(event: Event) -> None:
        raise RuntimeError("broken")

    bus.subscribe(broken)
    bus.subscribe(seen.append, flows=False)
    with caplog.at_level(logging.ERROR):
        bus.emit(UP)
        bus.emit(UP)
    assert seen == [UP, UP]
    assert caplog.text.count("RuntimeError: broken") == 1
    assert not bus.wanted


def test_text_and_json_forms() -> None:
    assert str(LinkUp(time=1.0, link="a\nb")) == r"LinkUp link='a\nb'"
    assert as_dict(UP) == {"event": "LinkUp", "time": 1.0, "link": "qemu:/net.sock"}
