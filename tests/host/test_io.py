"""Descriptors that are kept from guests."""

from __future__ import annotations

import socket

import pytest

from netstack.host.io import HostIO, native_io


def test_who_finds_only_reserved_descriptors_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end without octets would read as an empty answer."""
    monkeypatch.setattr("netstack.host.io.highest_descriptor", lambda reserve: 0)
    io: HostIO = native_io()
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
            accepted, _ = server.accept()
            with pytest.raises(OSError, match="reserved"):
                io.admit(accepted)
            assert accepted.fileno() == -1
            client.settimeout(10)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    finally:
        io.close()
