"""What runs inside the VM: the forwarder, `expose-port`, `list-ports` (spec vpnkit 1.2, 1.3, 7.5, 7.9)."""
