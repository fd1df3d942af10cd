"""Programs for the inside of a machine. Each is one file that runs by itself too, with Python's standard library alone.

No more of that is used than Debian's python3-minimal has (no asyncio, no ctypes), so that a small image will do. An address is a
port of vsock, or, for tests and for whoever forwards otherwise, the path of a Unix socket.
"""
