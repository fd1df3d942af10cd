"""HTTP proxying for guests: VPNKit's explicit proxy on the gateway, and its interception of ports 80 and 443."""
