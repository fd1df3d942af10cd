"""File-sharing companions: what serves a directory of the host to a guest, and who owns what is in it (spec companions 2)."""
