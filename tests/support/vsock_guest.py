"""What runs inside a machine in tests of vsock; nothing but Python's minimal library is there.

serve PORT ...          on each port, per connection a line that says what is wanted: `echo`, `sum` (of what comes, said at its
                        end), `give N` (octets), `hold` (until the other end goes)
up PORT OCTETS          send so much to the host and end; what it says, and the sum
down PORT OCTETS        ask the host for so much; the sum
talk PORT TEXT          send and end; what it says
many PORT N             N connections at once, each of them says its number; how many heard it again
refused PORT            what connecting to the host fails with
hear PORT LINE          connect, say a line, and say how it ends
"""

import errno
import hashlib
import socket
import sys
import threading
import time

HOST = 2


def dial(port):
    sock = socket.socket(socket.AF_VSOCK)
    sock.connect((HOST, port))
    return sock


def pattern(octets):
    block = b"".join(number.to_bytes(4, "big") for number in range(1 << 14))
    while octets > 0:
        yield block[:octets]
        octets -= len(block)


def read_all(sock, digest=None):
    found = []
    while piece := sock.recv(1 << 18):
        if digest is None:
            found.append(piece)
        else:
            digest.update(piece)
    return b"".join(found)


def give(sock, octets):
    for piece in pattern(octets):
        sock.sendall(piece)


def served(sock):
    with sock:
        line = b""
        while not line.endswith(b"\n"):
            octet = sock.recv(1)
            if not octet:
                return
            line += octet
        word, *rest = line.decode().split()
        if word == "echo":
            while piece := sock.recv(1 << 16):
                sock.sendall(piece)
        elif word == "sum":
            digest = hashlib.sha256()
            read_all(sock, digest)
            sock.sendall(digest.hexdigest().encode())
        elif word == "drop":
            while sock.recv(1 << 18):
                pass
        elif word == "give":
            give(sock, int(rest[0]))
        elif word == "hold":
            sock.sendall(b"held\n")
            read_all(sock)


def serve(*ports):
    def listen(listener):
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=served, args=[sock], daemon=True).start()

    for port in ports:
        listener = socket.socket(socket.AF_VSOCK)
        listener.bind((socket.VMADDR_CID_ANY, int(port)))
        listener.listen(512)
        threading.Thread(target=listen, args=[listener]).start()
    print("serving", flush=True)


def up(port, octets):
    began = time.monotonic()
    with dial(int(port)) as sock:
        give(sock, int(octets))
        sock.shutdown(socket.SHUT_WR)
        said = read_all(sock).decode()
    took = time.monotonic() - began
    digest = hashlib.sha256()
    for piece in pattern(int(octets)):
        digest.update(piece)
    print(said, digest.hexdigest(), f"{took:.3f}")


def down(port, octets):
    with dial(int(port)) as sock:
        sock.sendall(octets.encode() + b"\n")
        digest = hashlib.sha256()
        read_all(sock, digest)
    print(digest.hexdigest())


def talk(port, text):
    with dial(int(port)) as sock:
        sock.sendall(text.encode())
        sock.shutdown(socket.SHUT_WR)
        print(read_all(sock).decode())


def many(port, count):
    socks = [dial(int(port)) for _ in range(int(count))]
    for number, sock in enumerate(socks):
        sock.sendall(b"%d" % number)
        sock.shutdown(socket.SHUT_WR)
    print(sum(read_all(sock) == b"%d" % number for number, sock in enumerate(socks)))


def refused(port):
    try:
        dial(int(port))
    except OSError as error:
        print(errno.errorcode[error.errno])


def hear(port, line):
    with dial(int(port)) as sock:
        sock.sendall(line.encode() + b"\n")
        print("connected", flush=True)
        try:
            print("end", read_all(sock))
        except OSError as error:
            print(errno.errorcode[error.errno])


globals()[sys.argv[1]](*sys.argv[2:])
