"""The multiplexed data plane to `vpnkit-forwarder` (spec vpnkit 7.3)."""
