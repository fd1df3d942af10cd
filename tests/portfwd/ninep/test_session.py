"""One connection, message by message: versions, fids, walks, directories, and peers that mean no good (appendix D)."""

from __future__ import annotations

import pytest

from netstack.errors import HostError, Malformed
from portfwd.ninep.client import Client, Rejected
from portfwd.ninep.messages import (
    DMDIR,
    NOFID,
    NOTAG,
    ORCLOSE,
    Message,
    Rattach,
    Rclunk,
    Rcreate,
    Request,
    Rerror,
    Rflush,
    Ropen,
    Rread,
    Rversion,
    Rwalk,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twalk,
    Twrite,
)
from portfwd.ninep.server import MAX_HELD, MAX_MSIZE
from portfwd.ninep.wire import emit, parse, parse_stats
from tests.portfwd.ninep.site import Direct, Site, client_of


class Talk:
    """Requests in, replies out, in one dialect."""

    def __init__(self, wire: Direct, version: str = "9P2000", msize: int = 8192) -> None:
        self.session = wire.session
        self.unix = version == "9P2000.u"
        assert self(Tversion(NOTAG, msize, version)) == Rversion(NOTAG, min(msize, MAX_MSIZE), version)
        assert isinstance(self(Tattach(1, 0, NOFID, "", "")), Rattach)

    def __call__(self, request: Message) -> Message:
        self.session.feed(emit(request, unix=self.unix))
        answer = self.session.next()
        assert answer is not None
        assert self.session.next() is None, "one answer for one request"
        return parse(answer, unix=self.unix)

    def error(self, request: Request) -> str:
        answer = self(request)
        assert isinstance(answer, Rerror), answer
        return answer.ename


@pytest.fixture
def talk(site: Site) -> Talk:
    return Talk(site.wire())


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ((8192, "9P2000"), (8192, "9P2000")),
        ((4096, "9P2000.u"), (4096, "9P2000.u")),
        ((1 << 20, "9P2000"), (16384, "9P2000")),
        ((8192, "9P2000.L"), (8192, "unknown")),
        ((8192, ""), (8192, "unknown")),
    ],
)
def test_version_and_msize(site: Site, asked: tuple[int, str], answered: tuple[int, str]) -> None:
    session = site.wire().session
    session.feed(emit(Tversion(NOTAG, *asked)))
    assert session.next() == emit(Rversion(NOTAG, *answered))


def test_nothing_goes_before_a_version_is_agreed_on(site: Site) -> None:
    session = site.wire().session
    for request in (
        Tattach(1, 0, NOFID, "", ""),
        Tversion(2, 8192, "9P1999"),
        Tclunk(3, 0),
        Tversion(4, 100, "9P2000"),
    ):
        session.feed(emit(request))
    said = [parse(answer) for answer in iter(session.next, None)]
    assert [type(answer) for answer in said] == [Rerror, Rversion, Rerror, Rerror]
    assert [answer.tag for answer in said] == [1, 2, 3, 4]


def test_a_second_version_begins_anew(site: Site, talk: Talk) -> None:
    holder = site.client()
    holder.mkdir("x")
    assert isinstance(talk(Twalk(1, 0, 1, ("x", "ctl"))), Rwalk)
    talk(Topen(1, 1, 2))
    talk(Twrite(1, 1, 0, b"tcp:127.0.0.1:0:tcp:192.168.65.3:80"))
    assert len(site.registry) == 1
    talk(Tversion(NOTAG, 4096, "9P2000.u"))
    assert talk.session.fids == 0
    assert len(site.registry) == 0, "the fid that held the port is clunked"
    talk.unix = True
    answer = talk(Tclunk(1, 1))
    assert isinstance(answer, Rclunk)
    assert talk(Tstat(1, 0)) == Rerror(1, "fid not found", 9)


def test_authentication_is_not_required(talk: Talk) -> None:
    assert talk.error(Tauth(1, 5, "root", "")) == "authentication not required"
    assert talk.error(Tattach(1, 7, 5, "root", "")) == "authentication not required"


def test_a_flush_is_answered_whatever_it_is_for(talk: Talk) -> None:
    assert talk(Tflush(5, 4)) == Rflush(5)


def test_a_tag_may_be_used_again_and_twice(site: Site, talk: Talk) -> None:
    talk.session.feed(emit(Twalk(7, 0, 1, ())) * 2)
    first, second = talk.session.next(), talk.session.next()
    assert first is not None and second is not None
    assert [type(parse(answer)) for answer in (first, second)] == [Rwalk, Rerror]


def test_a_walk_that_fails_at_once_is_an_error_and_later_is_short(site: Site, talk: Talk) -> None:
    site.client().mkdir("x")
    assert talk.error(Twalk(1, 0, 1, ("nothing", "ctl"))) == "file not found"
    short = talk(Twalk(1, 0, 1, ("x", "nothing", "ctl")))
    assert isinstance(short, Rwalk) and len(short.qids) == 1
    assert talk.error(Tstat(1, 1)) == "fid not found"
    whole = talk(Twalk(1, 0, 1, ("x", "ctl", "..", "README")))
    assert isinstance(whole, Rwalk)
    assert [qid.kind for qid in whole.qids] == [0x80, 0, 0x80, 0]


def test_fids_are_cloned_moved_and_not_taken_twice(talk: Talk) -> None:
    assert talk(Twalk(1, 0, 1, ())) == Rwalk(1, ())
    assert talk.error(Twalk(1, 0, 1, ())) == "fid already in use"
    assert talk.error(Tattach(1, 1, NOFID, "", "")) == "fid already in use"
    assert talk.error(Tattach(1, NOFID, NOFID, "", "")) == "fid already in use"
    assert isinstance(talk(Twalk(1, 1, 1, ("README",))), Rwalk)
    assert isinstance(talk(Topen(1, 1, 0)), Ropen)
    assert talk.error(Twalk(1, 1, 1, ("..",))) == "fid already open"
    assert isinstance(talk(Twalk(1, 1, 2, ("..",))), Rwalk), "Linux clones open fids"
    assert talk.error(Topen(1, 1, 0)) == "fid already open"
    assert talk.error(Tread(1, 2, 0, 10)) == "fid not open"
    assert talk.error(Tread(1, 99, 0, 10)) == "fid not found"
    assert talk.error(Topen(1, 2, ORCLOSE)) == "Operation not supported"
    assert talk(Tclunk(1, 99)) == Rclunk(1)


def test_a_failed_remove_clunks_too(talk: Talk) -> None:
    talk(Twalk(1, 0, 1, ("README",)))
    assert talk.error(Tremove(1, 1)) == "permission denied"
    assert talk.error(Tremove(1, 1)) == "fid not found"


def test_iounits(site: Site, talk: Talk) -> None:
    talk(Twalk(1, 0, 1, ("README",)))
    opened = talk(Topen(1, 1, 0))
    assert isinstance(opened, Ropen) and opened.iounit == 32768
    talk(Twalk(1, 0, 2, ()))
    made = talk(Tcreate(1, 2, "x", DMDIR | 0o777, 0))
    assert isinstance(made, Rcreate) and made.iounit == 512 and made.qid.kind == 0x80
    assert talk.error(Tcreate(1, 2, "y", DMDIR, 0)) == "fid already open"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 1025])
def test_names_that_are_none(talk: Talk, name: str) -> None:
    assert talk.error(Tcreate(1, 0, name, DMDIR, 0)) == "Invalid argument"


def test_a_directory_is_read_in_whole_entries_from_where_it_was_left(site: Site, talk: Talk) -> None:
    holder = site.client()
    for number in range(30):
        holder.mkdir(f"name{number:02}")
    talk(Twalk(1, 0, 1, ()))
    talk(Topen(1, 1, 0))
    names: list[str] = []
    offset = 0
    while True:
        answer = talk(Tread(1, 1, offset, 200))
        assert isinstance(answer, Rread) and len(answer.data) <= 200
        if not answer.data:
            break
        names += [stat.name for stat in parse_stats(answer.data)]
        offset += len(answer.data)
    assert names == [".", "..", "README", *(f"name{number:02}" for number in range(30))]
    assert talk.error(Tread(1, 1, 7, 200)) == "Illegal seek"
    assert talk.error(Tread(1, 1, 0, 20)) == "the next directory entry is longer than count"
    again = talk(Tread(1, 1, 0, 100_000))
    assert isinstance(again, Rread) and len(parse_stats(again.data)) == 33, "and from the beginning"


def test_no_answer_is_longer_than_msize(site: Site) -> None:
    holder = site.client()
    holder.mkdir("n" * 1000)
    talk = Talk(site.wire(), msize=512)
    talk(Twalk(1, 0, 1, ()))
    talk(Topen(1, 1, 0))
    answer = talk(Tread(1, 1, 0, 1 << 31))
    assert isinstance(answer, Rread)
    assert [stat.name for stat in parse_stats(answer.data)] == [".", "..", "README"]
    assert talk(Tread(1, 1, len(answer.data), 1 << 31)) == Rread(1, b""), "what does not fit is left out"
    talk(Twalk(1, 0, 2, ("README",)))
    talk(Topen(1, 2, 0))
    answer = talk(Tread(1, 2, 0, 1 << 31))
    assert isinstance(answer, Rread) and len(answer.data) == 512 - 11
    other = site.client()
    fid = other.walk("n" * 1000)
    assert other.stat(fid).name == "n" * 1000


def test_a_long_name_cannot_be_told_in_a_small_msize(site: Site) -> None:
    talk = Talk(site.wire(), msize=512)
    talk(Tcreate(1, 0, "n" * 480, DMDIR, 0))
    assert talk.error(Tstat(1, 0)) == "the answer is longer than msize"


def test_a_message_of_more_than_msize_ends_the_connection(site: Site) -> None:
    talk = Talk(site.wire(), msize=4096)
    talk.session.feed((4097).to_bytes(4, "little"))
    with pytest.raises(Malformed):
        talk.session.next()


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        ("07000000 63 0900", "no message of type 99"),
        ("07000000 79 0900", "only a server sends that message"),
        ("09000000 78 0900 0000", "beyond"),
        ("11000000 6e 0900 00000000 01000000 1100", "17 names"),
    ],
)
def test_a_request_that_is_wrong_is_answered_and_the_next_is_right(talk: Talk, octets: str, why: str) -> None:
    wrong = bytes.fromhex(octets)
    wrong = len(wrong).to_bytes(4, "little") + wrong[4:]
    talk.session.feed(wrong)
    answer = talk.session.next()
    assert answer is not None
    said = parse(answer)
    assert isinstance(said, Rerror) and said.tag == 9 and why in said.ename
    assert isinstance(talk(Twalk(1, 0, 1, ())), Rwalk)


def test_fids_are_bounded_and_those_held_still_work(site: Site) -> None:
    talk = Talk(site.wire(max_fids=50))
    answers = [talk(Twalk(1, 0, fid, ())) for fid in range(1, 100)]
    assert sum(isinstance(answer, Rwalk) for answer in answers) == 49
    assert talk.session.fids == 50
    assert talk.error(Twalk(1, 0, 1000, ())) == "Too many open files"
    talk(Tclunk(1, 7))
    assert isinstance(talk(Twalk(1, 0, 1000, ())), Rwalk)


def test_what_open_directories_keep_is_bounded(site: Site) -> None:
    holder = site.client()
    for number in range(1000):
        holder.mkdir(f"{number:0200}")
    wire = site.wire()
    client = client_of(wire)
    refused = 0
    for _ in range(100):
        fid = client.walk()
        client.open(fid)
        try:
            client.read(fid, 0, 1000)
        except Rejected as error:
            assert error.text == "Cannot allocate memory"
            refused += 1
    assert 0 < refused < 100
    assert wire.session._held <= MAX_HELD
    wire.session.close()
    assert wire.session._held == 0


def test_half_a_message_waits_and_harms_nobody(site: Site, talk: Talk) -> None:
    whole = emit(Twalk(1, 0, 1, ("README",)))
    for at in range(len(whole) - 1):
        talk.session.feed(whole[at : at + 1])
        assert talk.session.next() is None
    other = site.client()
    assert other.load("README")
    talk.session.feed(whole[-1:])
    assert talk.session.next() is not None


def test_closing_twice_is_harmless(talk: Talk) -> None:
    talk.session.close()
    talk.session.close()
    assert talk.session.fids == 0


class Odd:
    """A server that is none."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.closed = False

    def settimeout(self, _timeout: float) -> None: ...

    def sendall(self, _octets: bytes) -> None: ...

    def recv(self, _octets: int) -> bytes:
        return self.answers.pop(0) if self.answers else b""

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([], "has ended the connection"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "is that a 9P server"),
        ([emit(Rversion(NOTAG, 4096, "unknown"))], "asked for 9P2000"),
        ([emit(Rversion(NOTAG, 1 << 20, "9P2000"))], "asked for 9P2000"),
        ([emit(Rclunk(NOTAG))], "no answer to"),
    ],
)
def test_a_client_says_what_is_wrong_with_the_server(answers: list[bytes], why: str) -> None:
    odd = Odd(*answers)
    with pytest.raises(HostError, match=why):
        Client(odd)  # type: ignore[arg-type]
    assert odd.closed
