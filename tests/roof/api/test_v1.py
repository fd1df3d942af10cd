"""Forwards, leases, flows and metrics as a client of the control API sees them, with a guest on a link."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from netstack.flow.records import FlowRecord
from portfwd.owners import Owner
from portfwd.spec import PublishSpec
from pyvpnkit.api import shapes
from tests.roof.api.conftest import Control, control_server, free_port, until
from tests.roof.guest import HOST, Connection, StreamGuest


async def connected(guest: StreamGuest, port: int) -> Connection:
    found = await asyncio.to_thread(guest.connect, HOST, port)
    assert found is not None
    return found


# Forwards.


async def test_a_published_port_is_listed_found_and_removed(control: Control) -> None:
    made = await control.ask("POST", "/v1/forwards", {"spec": "0:80"})
    assert made.status == 201
    forward = made.json
    assert forward["asked"] == "tcp:127.0.0.1:0:80"
    assert forward["spec"] == f"tcp:127.0.0.1:{forward['port']}:80"
    assert (forward["owner"], forward["accepted"], forward["guest"]) == ("hand", 0, None)
    assert (await control.ask("GET", "/v1/forwards")).json == {"forwards": [forward], "failed": []}
    assert (await control.ask("GET", f"/v1/forwards/{forward['id']}")).json == forward
    with socket.create_connection(("127.0.0.1", forward["port"])):
        await until(lambda: next(iter(control.service.registry)).accepted == 1)
    assert (await control.ask("GET", f"/v1/forwards/{forward['id']}")).json["accepted"] == 1
    removed = await control.ask("DELETE", f"/v1/forwards/{forward['id']}")
    assert (removed.status, removed.json["id"]) == (200, forward["id"])
    assert (await control.ask("DELETE", f"/v1/forwards/{forward['id']}")).status == 404
    assert (await control.ask("GET", "/v1/forwards")).json == {"forwards": [], "failed": []}
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", forward["port"])):
        pass


async def test_publishing_twice_is_one_forward(control: Control) -> None:
    port = free_port()
    first = await control.ask("POST", "/v1/forwards", {"spec": f"{port}:80"})
    again = await control.ask("POST", "/v1/forwards", {"port": port, "guest_port": 80})
    assert (first.status, again.status) == (201, 200)
    assert first.json == again.json
    assert len(control.service.registry) == 1


async def test_a_taken_port_names_who_has_it(control: Control) -> None:
    port = free_port()
    control.service.registry.add(PublishSpec(port=port, guest_port=80), Owner("9p", "3"))
    reply = await control.ask("POST", "/v1/forwards", {"spec": f"{port}:81"})
    assert reply.status == 409
    assert reply.json["holder"]["owner"] == "9p 3"
    assert f"{port}:80" in reply.message and "remove that one first" in reply.message
    with socket.create_server(("127.0.0.1", 0)) as taken:
        reply = await control.ask("POST", "/v1/forwards", {"spec": f"{taken.getsockname()[1]}:80"})
    assert reply.status == 409
    assert f"pid {os.getpid()}" in reply.message and "holder" not in reply.json


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        pytest.param({"spec": "x"}, 400, "8080:80", id="no spec"),
        pytest.param({}, 400, "guest port 0", id="nothing"),
        pytest.param({"spec": "1:1", "port": 1}, 400, "not known", id="both forms"),
        pytest.param({"port": 80}, 400, "guest port", id="no guest port"),
        pytest.param({"port": 80, "guest_port": 80, "protocol": "sctp"}, 400, "tcp, udp, unix", id="protocol"),
        pytest.param({"spec": "192.0.2.1:0:80"}, 400, "not an address of this host", id="foreign address"),
        pytest.param({"guest_port": 80, "bind": "0.0.0.0\n"}, 400, "IP address", id="odd address"),
        pytest.param({"protocol": "unix", "path": "relative", "guest_port": 1}, 400, "relative", id="path"),
        pytest.param({"spec": "2000-4000:2000-4000"}, 429, "1024 published ports", id="too many"),
        pytest.param({"spec": "0:80,via=forwarder", "x": 1}, 400, "not known", id="unknown member"),
    ],
)
async def test_what_cannot_be_published_says_why(
    control: Control, body: dict[str, Any], status: int, words: str
) -> None:
    reply = await control.ask("POST", "/v1/forwards", body)
    assert reply.status == status
    assert words in reply.message
    assert not len(control.service.registry)


async def test_a_bind_address_that_is_not_allowed_is_403(control: Control) -> None:
    control.service.registry.allowed = frozenset({"127.0.0.1"})
    reply = await control.ask("POST", "/v1/forwards", {"spec": "0.0.0.0:0:80"})
    assert (reply.status, "allowed_bind_addresses" in reply.message) == (403, True)


async def test_a_range_that_is_half_taken_is_not_published_at_all(control: Control) -> None:
    last = free_port(3) + 2
    with socket.create_server(("127.0.0.1", last)):
        reply = await control.ask("POST", "/v1/forwards", {"port": last - 2, "guest_port": 10, "count": 3})
        assert reply.status == 409
        assert not len(control.service.registry)
        with socket.create_server(("127.0.0.1", last - 1)):
            pass


async def test_a_forward_is_removed_by_its_text_asked_or_real(control: Control) -> None:
    for word in ("asked", "spec"):
        made = (await control.ask("POST", "/v1/forwards", {"spec": "udp:0:53"})).json
        assert (await control.ask("DELETE", f"/v1/forwards?spec={made[word]}")).json["id"] == made["id"]
    reply = await control.ask("DELETE", "/v1/forwards?spec=1:1")
    assert (reply.status, "GET /v1/forwards" in reply.message) == (404, True)
    assert (await control.ask("DELETE", "/v1/forwards?spec=bad")).status == 400


async def test_what_could_not_be_published_again_is_listed_tried_and_given_up(tmp_path: Path) -> None:
    """Threats L8: somebody took the port while the daemon was away."""
    taken, other = free_port(), free_port()
    for spec in (f"{taken}:80", f"{other}:81"):
        async with control_server(tmp_path, state_directory=tmp_path) as control:
            assert (await control.ask("POST", "/v1/forwards", {"spec": spec})).status == 201
    with socket.create_server(("127.0.0.1", taken)), socket.create_server(("127.0.0.1", other)):
        async with control_server(tmp_path, state_directory=tmp_path) as control:
            found = (await control.ask("GET", "/v1/forwards")).json
            assert found["forwards"] == []
            assert [one["spec"] for one in found["failed"]] == [
                f"tcp:127.0.0.1:{taken}:80",
                f"tcp:127.0.0.1:{other}:81",
            ]
            assert all(f"pid {os.getpid()}" in one["message"] for one in found["failed"])
            assert (await control.ask("DELETE", f"/v1/forwards?spec={other}:81")).json == found["failed"][1]
            assert (await control.ask("DELETE", f"/v1/forwards?spec={other}:81")).status == 404
            assert (await control.ask("POST", "/v1/forwards", {"spec": f"{taken}:80"})).status == 409
            assert len((await control.ask("GET", "/v1/forwards")).json["failed"]) == 1
    async with control_server(tmp_path, state_directory=tmp_path) as control:
        found = (await control.ask("GET", "/v1/forwards")).json
        assert ([one["port"] for one in found["forwards"]], found["failed"]) == ([taken], [])


async def test_a_failed_forward_that_is_published_after_all_is_no_failure_any_more(tmp_path: Path) -> None:
    port = free_port()
    async with control_server(tmp_path, state_directory=tmp_path) as control:
        await control.ask("POST", "/v1/forwards", {"spec": f"{port}:80"})
    with socket.create_server(("127.0.0.1", port)):
        control_of = control_server(tmp_path, state_directory=tmp_path)
        control = await control_of.__aenter__()
    assert (await control.ask("POST", "/v1/forwards", {"spec": f"{port}:80"})).status == 201
    found = (await control.ask("GET", "/v1/forwards")).json
    assert (len(found["forwards"]), found["failed"]) == (1, [])
    await control_of.__aexit__(None, None, None)


# Leases.


async def test_a_static_lease_holds_at_once(control: Control) -> None:
    lease = {"mac": "02:00:00:00:00:07", "address": "192.168.65.77"}
    assert (await control.ask("POST", "/v1/leases", lease)).status == 201
    assert (await control.ask("POST", "/v1/leases", {**lease, "mac": "02-00-00-00-00-07"})).status == 200
    guest = await asyncio.to_thread(StreamGuest, control.link)
    assert socket.inet_ntoa(await asyncio.to_thread(guest.lease)) == "192.168.65.77"
    listed = (await control.ask("GET", "/v1/leases")).json["leases"]
    assert [(one["address"], one["mac"], one["static"]) for one in listed] == [
        ("192.168.65.77", "02:00:00:00:00:07", True)
    ]
    assert listed[0]["expires_in_s"] > 0 and listed[0]["link"].startswith("qemu:")
    assert (await control.ask("DELETE", "/v1/leases/02:00:00:00:00:07")).json == lease
    assert (await control.ask("DELETE", "/v1/leases/02:00:00:00:00:07")).status == 404
    assert (await control.ask("GET", "/v1/leases")).json["leases"][0]["static"] is False
    guest.close()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        pytest.param({"mac": "02:00:00:00:00:08", "address": "192.168.65.50"}, 409, "has the address", id="address"),
        pytest.param({"mac": "02:00:00:00:00:01", "address": "192.168.65.51"}, 409, "192.168.65.50", id="MAC"),
        pytest.param({"mac": "02:00:00:00:00:08", "address": "192.168.65.1"}, 400, "gateway", id="gateway"),
        pytest.param({"mac": "02:00:00:00:00:08", "address": "10.0.0.1"}, 400, "192.168.65.0/24", id="elsewhere"),
        pytest.param({"mac": "02:00:00:00:00:08", "address": "1.2.3.400"}, 400, "not an IPv4 address", id="no address"),
        pytest.param({"mac": "03:00:00:00:00:08", "address": "192.168.65.60"}, 400, "no guest has", id="group MAC"),
        pytest.param({"mac": "02-00:00:00:00:08", "address": "192.168.65.60"}, 400, "not of the form", id="no MAC"),
        pytest.param({"mac": "02:00:00:00:00:08"}, 400, "'address' is missing", id="half"),
    ],
)
async def test_a_static_lease_that_cannot_be_says_why(
    control: Control, body: dict[str, str], status: int, words: str
) -> None:
    await control.ask("POST", "/v1/leases", {"mac": "02:00:00:00:00:01", "address": "192.168.65.50"})
    reply = await control.ask("POST", "/v1/leases", body)
    assert reply.status == status
    assert words in reply.message
    assert len((await control.ask("GET", "/v1/leases")).json["leases"]) == 1


# Flows.


async def test_a_flow_shows_both_ends_on_both_sides_and_can_be_reset(control: Control, guest: StreamGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connection = await connected(guest, port)
        accepted, client = server.accept()
        with accepted:
            accepted.sendall(b"12345")
            (flow,) = (await control.ask("GET", "/v1/flows?protocol=tcp")).json["flows"]
            address = socket.inet_ntoa(guest.address)
            assert flow["guest"] == f"{address}:{connection.own_port}"
            assert flow["remote"] == f"192.168.65.2:{port}"
            assert flow["host_local"] == f"127.0.0.1:{client[1]}"
            assert flow["host_remote"] == f"127.0.0.1:{port}"
            assert (flow["state"], flow["direction"]) == ("ESTABLISHED", "outbound")
            for target, count in (
                (f"/v1/flows?guest={address}", 1),
                (f"/v1/flows?guest={flow['guest']}", 1),
                ("/v1/flows?guest=192.168.65.99", 0),
                ("/v1/flows?protocol=udp", 0),
                ("/v1/flows?limit=0", 0),
            ):
                found = (await control.ask("GET", target)).json
                assert len(found["flows"]) == count, target
                assert found["total"] == (1 if "limit" in target else count)
            assert (await control.ask("DELETE", f"/v1/flows/{flow['id']}")).json == {"id": flow["id"]}
            assert await asyncio.to_thread(connection.ended_by) == "RST"
            with pytest.raises(ConnectionResetError):
                accepted.settimeout(10)
                while accepted.recv(100):
                    pass
    reply = await control.ask("DELETE", f"/v1/flows/{flow['id']}")
    assert (reply.status, "GET /v1/flows" in reply.message) == (404, True)
    assert (await control.ask("GET", "/v1/flows?protocol=tcp")).json == {"flows": [], "total": 0}


async def test_a_long_list_of_flows_is_whole(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(number: int) -> FlowRecord:
        names = {name: f"{name}{number}" for name in ("id", "guest", "remote", "host_local", "host_remote", "state")}
        numbers = {"remotes": 1, "octets_outbound": number, "octets_inbound": 0, "age_s": 1.5, "idle_s": None}
        return FlowRecord(protocol="tcp", direction="inbound", **names, **numbers)  # type: ignore[arg-type]

    records = [made(number) for number in range(1000)]
    monkeypatch.setattr(control.service.stack, "flow_table", lambda: records, raising=True)
    for limit, count in ((0, 0), (200, 200), (201, 201), (999, 999), (100_000, 1000)):
        found = (await control.ask("GET", f"/v1/flows?limit={limit}")).json
        assert found["total"] == 1000
        assert [flow["octets_outbound"] for flow in found["flows"]] == list(range(count))
        assert all(set(flow) == set(shapes.FLOW["properties"]) for flow in found["flows"])


# The control API itself.


async def test_a_guest_does_not_reach_the_control_api_by_the_host_alias(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with control_server(tmp_path, listen=["tcp:127.0.0.1:0"]) as control:
        address = control.server.addresses[1]
        guest = await asyncio.to_thread(StreamGuest, control.link)
        await asyncio.to_thread(guest.lease)
        # It gets as far as to the host's loopback, as to any other port there.
        connection = await connected(guest, int(address.rpartition(":")[2]))
        assert await asyncio.to_thread(connection.ended_by) in ("RST", "FIN")
        assert control.server.http.counters.strangers == 1
        assert "a guest, by way of 127.0.0.1:" in caplog.text
        assert (await control.ask("GET", "/v1/status", address=address)).status == 200
        guest.close()


# Metrics.


async def test_metrics_are_prometheus_text_with_every_label_escaped(control: Control, guest: StreamGuest) -> None:
    await control.ask("POST", "/v1/forwards", {"spec": '0:80,annotation=a"b\\c%0Ad'})
    guest.send(b"short")
    await until(lambda: control.service.stack.counters.drops["frame_short"] == 1)
    reply = await control.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = parse_metrics(reply.body.decode())
    assert samples['pyvpnkit_drops_total{reason="frame_short"}'] == 1
    assert samples['pyvpnkit_flows{protocol="tcp"}'] == 0
    assert samples["pyvpnkit_guests"] == samples["pyvpnkit_leases"] == samples["pyvpnkit_forwards"] == 1
    assert any(name.startswith('pyvpnkit_link_frames_total{link="qemu:') for name in samples)
    assert any(name.startswith('pyvpnkit_forward_accepted_total{id="1"') and '\\"b' in name for name in samples)


def parse_metrics(text: str) -> dict[str, float]:
    """As strict as a scraper: types come before samples, and the samples of a family stand together."""
    samples: dict[str, float] = {}
    family, seen = "", set[str]()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert kind in ("counter", "gauge") and family not in seen
            assert kind == "gauge" or family.endswith("_total")
            seen.add(family)
        elif not line.startswith("# HELP "):
            name, _, value = line.rpartition(" ")
            assert name.partition("{")[0] == family, line
            assert name not in samples
            samples[name] = float(value)
    return samples
