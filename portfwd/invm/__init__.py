"""What runs inside the VM: the forwarder, `expose-port`, `list-ports` (spec vpnkit 1.2, 1.3, 7.5, 7.9).

These import little, for they start once per port in small VMs. Each has `main(argv) -> int`, with flags as Go's programs take them.
"""

from typing import Final

TOOLS: Final = {
    "forwarder": "portfwd.invm.forwarder",
    "expose-port": "portfwd.invm.expose_port",
    "list-ports": "portfwd.invm.list_ports",
}
"""Command -> module, so that a command line is handed on before anything else is imported."""
