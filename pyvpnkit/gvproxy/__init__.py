"""gvproxy's own command line, configuration file and notifications, on the daemon of `pyvpnkit run`."""
