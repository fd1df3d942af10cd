"""`pyvpnkit kube-forwarder`: the Services of a Kubernetes cluster in the VM as ports of the host (spec vpnkit 7.8).

`services` reads what the API server says, `engine` compares what the Services want with what the host has and says what to do,
`cluster` talks to the API server by the official client, `forwarder` keeps both in line, `command` is the command line.
"""
