"""A server of 9P2000.L for folders of the host: `listen.FileServer`, and `python -m vm.filesystems.ninep`."""
