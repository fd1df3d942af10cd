"""What the control API shows of flows, and that a flow can be ended by its name."""

from __future__ import annotations

import os
import re
import socket
import struct
from pathlib import Path

import pytest

from netstack.api import Endpoint
from netstack.flow.records import FlowRecord, flow_id, local_end, remote_end
from netstack.observe.events import FlowClosed
from tests.support import packets
from tests.support.drill import GATEWAY, GUEST, SERVER, Drill, pattern
from tests.support.fake_host import Accept
from tests.support.packets import RST

REMOTE = "93.184.216.34:80"


def only(drill: Drill) -> FlowRecord:
    (record,) = drill.stack.flow_table()
    return record


def ping(drill: Drill, identifier: int) -> None:
    body = struct.pack("!BBHHH", 8, 0, 0, identifier, 1) + b"data"
    checked = body[:2] + packets.checksum(body).to_bytes(2, "big") + body[4:]
    drill.ip(packets.ICMP, checked, dst=packets.ip("93.184.216.34"))


# What is shown.


def test_a_guests_connection_with_both_of_its_ends() -> None:
    drill = Drill()
    flow = drill.open(sport=41000)
    drill.guest(flow, "P.", data=pattern(300))
    drill.host(flow).send(pattern(700))
    drill.transfer(flow, 700)
    drill.advance(2.0)
    record = only(drill)
    assert (record.protocol, record.direction, record.state) == ("tcp", "outbound", "ESTABLISHED")
    assert (record.guest, record.remote, record.remotes) == ("192.168.65.3:41000", REMOTE, 1)
    assert flow.sock is not None
    assert record.host_local == "{}:{}".format(*flow.sock.getsockname())
    assert record.host_remote == REMOTE
    assert (record.octets_outbound, record.octets_inbound) == (300, 700)
    assert 2.0 <= record.age_s < 3.0 and record.idle_s is None


def test_a_connection_that_is_being_made() -> None:
    drill = Drill()
    drill.io.on_connect(SERVER, Accept(after=5.0))
    drill.syn(drill.flow())
    assert only(drill).state == "CONNECTING"
    assert only(drill).host_remote == ""


def test_a_published_port_is_shown_as_inbound_and_while_its_guest_is_looked_for() -> None:
    drill = Drill(resolve=False)
    sock, _far = drill.io.connected(("198.51.100.9", 50000))
    drill.stack.dial(Endpoint(GUEST, 22), sock)
    record = only(drill)
    assert (record.direction, record.state) == ("inbound", "RESOLVING")
    assert (record.guest, record.host_local, record.host_remote) == (
        "192.168.65.3:22",
        "127.0.0.1:8080",
        "198.51.100.9:50000",
    )
    assert record.remote.startswith("192.168.65.1:")


def test_a_mapping_shows_the_last_of_its_remotes_and_how_many_there_are() -> None:
    drill = Drill()
    drill.udp(("198.51.100.1", 1000), b"one", sport=5000)
    drill.udp(("198.51.100.2", 2000), b"three", sport=5000)
    drill.advance(3.0)
    record = only(drill)
    assert (record.protocol, record.direction, record.state) == ("udp", "outbound", "UNANSWERED")
    assert (record.guest, record.remote, record.remotes) == ("192.168.65.3:5000", "198.51.100.2:2000", 2)
    assert record.host_remote == "198.51.100.2:2000"
    assert re.fullmatch(r"0\.0\.0\.0:\d+|", record.host_local)
    assert (record.octets_outbound, record.octets_inbound) == (8, 0)
    assert record.idle_s is not None and 3.0 <= record.idle_s <= record.age_s < 4.0
    drill.io.datagrams[-1].sock.deliver(b"answer", ("198.51.100.2", 2000))
    drill.settle()
    answered = only(drill)
    assert (answered.state, answered.octets_inbound, answered.id) == ("ANSWERED", 6, record.id)
    assert answered.idle_s == 0.0


def test_where_loopback_is_behind_the_alias_both_views_are_shown() -> None:
    drill = Drill()
    drill.udp(("192.168.65.2", 1000), b"x")
    record = only(drill)
    assert (record.remote, record.host_remote) == ("192.168.65.2:1000", "127.0.0.1:1000")


def test_a_peer_of_a_published_udp_port() -> None:
    drill = Drill()
    published = drill.io.bound()
    drill.stack.datagrams(Endpoint(GUEST, 9000), published)
    published.deliver(b"x", ("127.0.0.1", 40000))
    drill.settle()
    record = only(drill)
    assert (record.direction, record.guest, record.remote) == ("inbound", "192.168.65.3:9000", "192.168.65.1:40000")
    assert record.host_remote == "127.0.0.1:40000"
    assert record.host_local == "{}:{}".format(*published.getsockname())


def test_pings_are_in_the_table_but_not_among_the_flows() -> None:
    drill = Drill()
    ping(drill, 77)
    record = only(drill)
    assert (record.protocol, record.guest, record.remote, record.remotes) == ("icmp", "192.168.65.3:77", "*", 0)
    assert (record.state, record.octets_outbound) == ("UNANSWERED", 12)
    assert drill.stack.flows() == []


def test_without_being_asked_for_the_hosts_sockets_are_left_alone() -> None:
    drill = Drill()
    drill.open()
    drill.udp(("198.51.100.1", 1000), b"one")
    assert [(record.host_local, record.host_remote) for record in drill.stack.flows()] == [("", "")] * 2


# Names.


def test_names_are_unlike_and_stay_while_the_flow_lives() -> None:
    drill = Drill()
    for number in range(5):
        drill.open(sport=41000 + number)
        drill.udp(("198.51.100.1", 1000), b"one", sport=41000 + number)
        ping(drill, 41000 + number)
    before = [record.id for record in drill.stack.flow_table()]
    assert len(set(before)) == 15 and all(re.fullmatch("[0-9a-f]{12}", id) for id in before)
    drill.advance(1.0)
    assert [record.id for record in drill.stack.flow_table()] == before


def test_a_later_flow_of_the_same_ends_has_another_name() -> None:
    drill = Drill()
    flow = drill.open(sport=41000)
    first = only(drill).id
    drill.reset(flow)
    drill.advance(0.001)
    drill.open(sport=41000)
    assert only(drill).id != first
    assert flow_id("tcp", bytes(12), 1.0) != flow_id("udp", bytes(12), 1.0)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="expected: unix sockets")
def test_ends_of_real_sockets_as_text(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET) as listener, socket.socket(socket.AF_INET) as client:
        assert (local_end(client), remote_end(client)) == ("0.0.0.0:0", "")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        assert remote_end(client) == f"127.0.0.1:{listener.getsockname()[1]}"
        assert local_end(client) == f"127.0.0.1:{client.getsockname()[1]}"
    with socket.socket(socket.AF_INET6) as six:
        six.bind(("::1", 0))
        assert local_end(six) == f"[::1]:{six.getsockname()[1]}"
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as client:
        path = str(tmp_path / "odd\nname")
        named.bind(path)
        named.listen()
        client.connect(path)
        assert (local_end(client), remote_end(client)) == ("", path.replace("\n", "\\x0a"))
    one, other = socket.socketpair()
    with one, other:
        assert (local_end(one), remote_end(one)) == ("", "")
    assert local_end(one) == "", "closed"
    if os.uname().sysname == "Linux":
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(b"\0pyvpnkit-test-%d" % os.getpid())
            assert local_end(abstract).startswith("\\x00pyvpnkit-test")


# Ends.


def test_a_reset_reaches_both_ends_in_the_middle_of_a_transfer() -> None:
    drill = Drill()
    other, flow = drill.open(), drill.open()
    far = drill.host(flow)
    far.send(pattern(100_000))
    drill.guest(flow, "P.", data=pattern(1000))
    (record,) = [each for each in drill.stack.flow_table() if each.guest.endswith(f":{flow.sport}")]
    assert drill.stack.reset_flow(record.id)
    drill.settle()
    segments = drill.collect(flow)
    assert segments[-1].flags & RST and segments[-1].seq == segments[-2].end
    assert far.aborted
    assert not drill.stack.reset_flow(record.id), "it is gone"
    closed = [event for event in drill.events if isinstance(event, FlowClosed)]
    assert [event.reason for event in closed] == ["reset by hand"]
    drill.guest(other, "P.", data=b"goes on")
    assert drill.host(other).received == b"goes on"


def test_a_connection_that_is_being_made_is_refused() -> None:
    drill = Drill()
    drill.io.on_connect(SERVER, Accept(after=5.0))
    flow = drill.flow()
    drill.syn(flow)
    assert drill.stack.reset_flow(only(drill).id)
    drill.settle()
    assert drill.expect(flow).flags & RST
    assert flow.sock is not None and flow.sock.closed
    drill.advance(10.0)
    drill.assert_clean()


def test_a_forward_whose_guest_is_looked_for_is_reset() -> None:
    drill = Drill(resolve=False)
    sock, far = drill.io.connected()
    reasons: list[str] = []
    drill.stack.dial(Endpoint(GUEST, 22), sock, on_close=reasons.append)
    assert drill.stack.reset_flow(only(drill).id)
    drill.advance(10.0)
    assert far.aborted and reasons == ["reset by hand"] and not drill.stack.flow_table()


def test_a_mapping_is_closed_and_the_guests_next_datagram_makes_another() -> None:
    drill = Drill()
    drill.udp(("198.51.100.1", 1000), b"one")
    sock = drill.io.datagrams[-1].sock
    first = only(drill).id
    drill.advance(0.001)
    assert drill.stack.reset_flow(first) and sock.closed and not drill.stack.flow_table()
    drill.udp(("198.51.100.1", 1000), b"two")
    assert only(drill).id != first and drill.io.datagrams[-1].sock is not sock


def test_a_peer_of_a_published_udp_port_is_forgotten_and_the_port_stays() -> None:
    drill = Drill()
    published = drill.io.bound()
    drill.stack.datagrams(Endpoint(GUEST, 9000), published)
    published.deliver(b"x", ("127.0.0.1", 40000))
    drill.settle()
    assert drill.stack.reset_flow(only(drill).id)
    assert not drill.stack.flow_table() and not published.closed
    drill.others.clear()
    published.deliver(b"again", ("127.0.0.1", 40000))
    drill.settle()
    assert drill.take_udp()[2] == b"again"


def test_a_ping_is_closed() -> None:
    drill = Drill()
    ping(drill, 77)
    assert drill.stack.reset_flow(only(drill).id)
    assert not drill.stack.flow_table() and not drill.stack.reset_flow("0" * 12)


def test_outside_of_a_turn_the_owner_is_told_of_the_work() -> None:
    drill = Drill()
    drill.open()
    told: list[int] = []
    drill.stack.on_work = lambda: told.append(1)
    assert drill.stack.reset_flow(only(drill).id)
    assert told


# The rest of what is shown.


def test_the_switchs_table_and_the_counters_as_gvproxy_names_them() -> None:
    drill = Drill()
    assert drill.stack.cam() == {"f6:16:36:bc:f9:c6": 0, "02:00:00:00:aa:03": 1}
    before = drill.stack.stats()
    frame = packets.ether(b"\xff" * 6, drill.flow().mac, 0x88CC, bytes(100))
    drill.inject(frame)
    drill.ip(packets.ICMP, echo_to_us())
    after = drill.stack.stats()
    (reply,) = [packet for packet in drill.others if packet.protocol == packets.ICMP]
    assert reply.source == GATEWAY
    assert after["BytesReceived"] - before["BytesReceived"] == len(frame) + 60
    assert after["BytesSent"] - before["BytesSent"] == 60
    assert after["drops.ethertype"] == 1 and after["frames_in"] - before["frames_in"] == 2
    assert all(isinstance(value, int) for value in after.values())


def echo_to_us() -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    return body[:2] + packets.checksum(body).to_bytes(2, "big") + body[4:]
