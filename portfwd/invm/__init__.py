"""What runs inside the VM: the forwarder, `expose-port`, `list-ports` (spec vpnkit 1.2, 1.3, 7.5, 7.9).

These import little, for they start once per port in small VMs. Each has `main(argv) -> int`, with flags as Go's programs take them.
"""
