"""VPNKit's Host mode: names are looked up by the host's library, and none waits for another (spec vpnkit 4.1, 10)."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dns import codec, host_mode
from dns.askers import askers
from dns.host_mode import HostMode
from dns.server import Server as DnsServer
from dns.servers import HOST, Resolvers, Server
from netstack.errors import HostError
from tests.dns.support import a_reply, ask, needs_dnsmasq, parse, query, upstream

ROOT = Path(__file__).parents[2]
ADDRESS = socket.inet_aton("192.0.2.7")


class Library:
    """Stands where getaddrinfo(3) does: knows `names`, fails with what `errors` say, and is slow for those `held`."""

    def __init__(self) -> None:
        self.names: dict[str, list[bytes]] = {}
        self.errors: dict[tuple[str, int], int] = {}
        self.asked: list[tuple[str, int]] = []
        self.held: Callable[[str], bool] = lambda name: False
        self.go_on = threading.Event()
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, family: int) -> list[bytes]:
        with self._lock:
            self.asked.append((name, family))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.held(name):
                assert self.go_on.wait(60)
            if (name, family) in self.errors:
                raise socket.gaierror(self.errors[name, family], "made up")
            octets = {socket.AF_INET: (4,), socket.AF_INET6: (16,), socket.AF_UNSPEC: (4, 16)}[
                socket.AddressFamily(family)
            ]
            found = [address for address in self.names.get(name, ()) if len(address) in octets]
            if not found:
                raise socket.gaierror(socket.EAI_NODATA if name in self.names else socket.EAI_NONAME, "made up")
            return found
        finally:
            with self._lock:
                self.at_once -= 1


@pytest.fixture
def library() -> Iterator[Library]:
    made = Library()
    yield made
    made.go_on.set()


def mode(library: Library, **settings: int) -> HostMode:
    return HostMode(addresses_of=library, threads=settings.get("threads", 16), waiting=settings.get("waiting", 512))


async def put(host: HostMode, name: str, qtype: str = "A") -> tuple[int, list[str]]:
    """The rcode and the records' data."""
    message = query(name, qtype)
    async with asyncio.timeout(30):
        answer = parse(await host.ask(message, codec.question_end(message)))
    assert answer.header.id == 0x1234 and answer.header.qr == 1 and answer.header.ra == 1 and answer.header.aa == 0
    assert str(answer.q.qname) == f"{name}."
    assert all(rr.ttl == 0 and str(rr.rname) == f"{name}." for rr in answer.rr)
    return answer.header.rcode, [str(rr.rdata) for rr in answer.rr]


async def test_addresses_are_the_librarys_in_its_order(library: Library) -> None:
    library.names["a.example."] = [socket.inet_aton(f"192.0.2.{n}") for n in (9, 1, 5)] + [bytes(15) + b"\1"]
    assert await put(mode(library), "a.example") == (codec.NOERROR, ["192.0.2.9", "192.0.2.1", "192.0.2.5"])
    assert await put(mode(library), "a.example", "AAAA") == (codec.NOERROR, ["::1"])


@pytest.mark.parametrize(
    ("error", "rcode"),
    [
        ("EAI_NONAME", codec.NXDOMAIN),
        ("EAI_NODATA", codec.NOERROR),  # upstream: moby#47628
        ("EAI_ADDRFAMILY", codec.NOERROR),
        ("EAI_AGAIN", codec.SERVFAIL),
        ("EAI_FAIL", codec.SERVFAIL),
        ("EAI_MEMORY", codec.SERVFAIL),
    ],
)
async def test_what_the_library_says_is_told_apart(library: Library, error: str, rcode: int) -> None:
    library.errors["a.example.", socket.AF_INET] = getattr(socket, error)
    assert await put(mode(library), "a.example") == (rcode, [])


async def test_a_name_without_ipv6_exists_even_where_the_library_says_it_does_not(library: Library) -> None:
    library.names["a.example."] = [ADDRESS]
    library.errors["a.example.", socket.AF_INET6] = socket.EAI_NONAME  # as macOS and old musl
    assert await put(mode(library), "a.example", "AAAA") == (codec.NOERROR, [])


async def test_names_of_one_label_may_be_completed_by_the_host_and_others_may_not(library: Library) -> None:
    library.names |= {"printer": [ADDRESS], "a.example.": [ADDRESS]}
    assert (await put(mode(library), "printer"))[0] == codec.NOERROR
    assert (await put(mode(library), "A.Example"))[0] == codec.NOERROR, (
        "the library is asked in lower case, the answer is not"
    )
    assert [name for name, _ in library.asked] == ["printer", "a.example."]


@pytest.mark.parametrize("name", ["127.1", "0x7f000001", "2130706433", "localhost.local"])
async def test_what_the_library_would_take_for_an_address_is_no_name(name: str) -> None:
    assert await put(HostMode(), name) == (codec.NXDOMAIN, [])


async def test_a_label_with_a_dot_or_a_nul_in_it_is_no_name_and_no_exception(library: Library) -> None:
    for label in (b"\3a.b", b"\3a\0b", b"\2\xc3\xa9", b"\1 "):
        message = query("example")[:12] + label + b"\7example\0\0\1\0\1"
        answer = await mode(library).ask(message, len(message))
        assert codec.rcode(answer) == codec.NXDOMAIN
    assert library.asked == []


async def test_the_name_of_an_address_is_asked_of_the_library(library: Library) -> None:
    def name_of(address: bytes) -> str:
        if address != ADDRESS:
            raise socket.gaierror(socket.EAI_NONAME, "made up")
        return "seven.example"

    host = HostMode(addresses_of=library, name_of=name_of)
    assert await put(host, "7.2.0.192.in-addr.arpa", "PTR") == (codec.NOERROR, ["seven.example."])
    assert await put(host, "8.2.0.192.in-addr.arpa", "PTR") == (codec.NXDOMAIN, [])
    assert await put(host, "2.0.192.in-addr.arpa", "PTR") == (codec.NXDOMAIN, [])


async def test_other_types_are_not_said_not_to_exist(library: Library) -> None:
    assert await put(mode(library), "a.example", "MX") == (codec.NOTIMP, [])
    assert await put(mode(library), "a.example", "HTTPS") == (codec.NOERROR, [])
    assert library.asked == []


async def test_other_types_are_relayed_to_the_hosts_resolvers_where_they_are_known() -> None:
    async with upstream(lambda asked: [a_reply(asked, "10.0.0.9")]) as other:
        others = Resolvers.of([other.spec])
        source = partial(Resolvers, servers=(Server(HOST),))
        server = DnsServer(hosts_path=None, source=source, asker_for=askers(lambda: others))
        answer = parse(await ask(server, query("a.example", "TXT")))
        assert len(other.asked) == 1 and answer.header.rcode == codec.NOERROR
        answer = parse(await ask(server, query("localhost", "A")))
        assert [str(rr.rdata) for rr in answer.rr] == ["127.0.0.1"], "of the real library"
        assert len(other.asked) == 1
        server.close()


# Slow names (upstream: "Blocking getaddrinfo filled a 4-thread pool: slow names stalled everything")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for is in threads
            await asyncio.sleep(0.005)


async def test_a_hundred_slow_names_of_a_domain_delay_no_other(library: Library) -> None:
    library.held = lambda name: name.endswith("corp.example.")
    library.names["a.other."] = [ADDRESS]
    host = mode(library)
    slow = [asyncio.create_task(put(host, f"n{number}.corp.example")) for number in range(100)]
    await until(lambda: library.at_once == 8)
    assert await put(host, "a.other") == (codec.NOERROR, ["192.0.2.7"])
    assert (host.running, host.waiting) == (8, 92)
    library.go_on.set()
    assert await asyncio.gather(*slow) == [(codec.NXDOMAIN, [])] * 100
    assert library.most_at_once <= 9 and (host.running, host.waiting) == (0, 0)


async def test_there_are_never_more_threads_than_said(library: Library) -> None:
    library.held = lambda name: True
    host = mode(library)
    slow = [asyncio.create_task(put(host, f"n.d{number}.example{number}")) for number in range(50)]
    await until(lambda: library.at_once == 16)
    assert (host.running, host.waiting) == (16, 34)
    library.go_on.set()
    await asyncio.gather(*slow)
    assert library.most_at_once == 16


async def test_equal_questions_share_a_look_up(library: Library) -> None:
    library.held = lambda name: True
    library.names["a.example."] = [ADDRESS]
    host = mode(library)
    same = [asyncio.create_task(put(host, "a.example")) for _ in range(50)]
    await until(lambda: library.at_once == 1)
    same[0].cancel()  # one who gives up takes nothing from the others
    library.go_on.set()
    assert await asyncio.gather(*same[1:]) == [(codec.NOERROR, ["192.0.2.7"])] * 49
    assert len(library.asked) == 1


async def test_beyond_the_queue_the_answer_is_servfail_and_a_domain_has_half_of_it(library: Library) -> None:
    library.held = lambda name: True
    host = mode(library, threads=2, waiting=10)
    slow = [asyncio.create_task(put(host, f"n{number}.corp.example")) for number in range(20)]
    await until(lambda: host.counters["getaddrinfo_over_limit"] == 14)  # 1 runs, 5 wait
    others = [asyncio.create_task(put(host, f"n.d{number}.example{number}")) for number in range(10)]
    await until(lambda: host.counters["getaddrinfo_over_limit"] == 18)  # 1 runs, 5 wait
    assert (host.running, host.waiting) == (2, 10)
    library.go_on.set()
    answers = await asyncio.gather(*slow, *others)
    assert answers.count((codec.SERVFAIL, [])) == 18 and answers.count((codec.NXDOMAIN, [])) == 12


async def test_a_look_up_nobody_waits_for_any_longer_is_not_begun(library: Library) -> None:
    library.held = lambda name: True
    host = mode(library, threads=1)
    running = asyncio.create_task(put(host, "first.example"))
    await until(lambda: library.at_once == 1)
    waiting = asyncio.create_task(put(host, "second.example"))
    await until(lambda: host.waiting == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert host.waiting == 0
    library.go_on.set()
    await running
    assert {name for name, _ in library.asked} == {"first.example."}


async def test_closing_ends_the_waiting_at_once(library: Library) -> None:
    library.held = lambda name: True
    host = mode(library, threads=1)
    waiting = [asyncio.create_task(put(host, f"n{number}.example")) for number in range(3)]
    await until(lambda: library.at_once == 1)
    host.close()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [HostError] * 3
    with pytest.raises(HostError):
        await put(host, "again.example")


def test_the_process_ends_though_a_look_up_hangs(library: Library) -> None:
    library.held = lambda name: True
    host = mode(library)

    async def one() -> None:
        task = asyncio.create_task(put(host, "a.example"))
        await until(lambda: library.at_once == 1)
        task.cancel()

    asyncio.run(one())
    hanging = [thread for thread in threading.enumerate() if thread.name == "getaddrinfo"]
    assert hanging and all(thread.daemon for thread in hanging)
    library.go_on.set()
    for thread in hanging:
        thread.join(30)
        assert not thread.is_alive(), "its loop is gone: it ends without a word"


async def test_the_hosts_own_library_is_asked() -> None:
    host = HostMode()
    assert await put(host, "localhost") == (codec.NOERROR, ["127.0.0.1"])
    assert host_mode.getaddrinfo("localhost", socket.AF_INET) == [socket.inet_aton("127.0.0.1")]


SCRIPT = """
import asyncio, sys
import netstack
from dns import codec
from dns.host_mode import HostMode

async def main():
    host = HostMode()
    for asked in sys.argv[1:]:
        name, qtype = asked.split("/")
        query = bytes([1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + codec.wire_name(name) + bytes([0, int(qtype), 0, 1])
        answer = await host.ask(query, len(query))
        print(asked, codec.rcode(answer), answer[7])

asyncio.run(main())
"""


@needs_dnsmasq
@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a resolv.conf of its own")
def test_the_real_library_tells_no_such_name_from_no_such_address_and_from_a_dead_server(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\nsearch lab.example\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    names = (
        "--address=/four.example/192.0.2.4",
        "--address=/printer.lab.example/sub.x.lab.example/192.0.2.5",
        "--address=/six.example/2001:db8::6",
        "--ptr-record=4.2.0.192.in-addr.arpa,four.example",
        "--local=/example/192.in-addr.arpa/x/",
        "--local=//",
        "--server=/dead.test/127.0.0.9",  # refuses
    )
    script = f"""
        mount --bind {tmp_path}/resolv.conf "$(realpath /etc/resolv.conf)"
        test ! -e /etc/nsswitch.conf || mount --bind {tmp_path}/nsswitch.conf /etc/nsswitch.conf
        ip link set lo up
        dnsmasq --keep-in-foreground --conf-file=/dev/null --no-hosts --no-resolv --user=root --pid-file= \
            --bind-interfaces --listen-address=127.0.0.1 {" ".join(names)} & dnsmasq=$!
        trap 'kill $dnsmasq' EXIT
        until ss -lnu | grep -q 127.0.0.1:53; do sleep 0.02; done
        {sys.executable} {tmp_path}/script.py four.example/1 four.example/28 six.example/1 six.example/28 none.example/1 \
            none.example/28 printer/1 sub.x/1 a.dead.test/1 4.2.0.192.in-addr.arpa/12 5.2.0.192.in-addr.arpa/12
    """
    done = subprocess.run(
        ("unshare", "--mount", "--net", "sh", "-ec", script), capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found == {
        "four.example/1": "0 1",
        "four.example/28": "0 0",
        "six.example/1": "0 0",
        "six.example/28": "0 1",
        "none.example/1": "3 0",
        "none.example/28": "3 0",
        "printer/1": "0 1",  # in the host's search domain
        "sub.x/1": "3 0",  # not tried there
        "a.dead.test/1": "2 0",
        "4.2.0.192.in-addr.arpa/12": "0 1",
        "5.2.0.192.in-addr.arpa/12": "3 0",
    }, done.stderr
