"""slirp4netns' own command line and API socket, on the daemon of `pyvpnkit run`."""
