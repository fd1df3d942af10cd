"""One API over the ways in which hypervisors hand vsock to programs of the host (spec companions 1.2)."""
