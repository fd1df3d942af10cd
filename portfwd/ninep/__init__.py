"""9P2000: the port control file system of VPNKit, and the read-only one for looking in (spec vpnkit 7.1, 8.2)."""
