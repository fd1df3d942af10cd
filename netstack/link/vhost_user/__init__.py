"""A vhost-user back-end: frames straight from and into the rings in a virtual machine's own memory (Linux).

`messages` (wire format), `memory` (the guest's memory, mapped), `ring` (split virtqueues), `device` (what the messages do, any
kind of device), `channel` (the control socket, any kind of device), `net` (virtio-net: features, configuration), `link` (the data
path), `server` (a network card's connection).
"""
