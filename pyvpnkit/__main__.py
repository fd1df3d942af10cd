"""`python -m pyvpnkit` is the command `pyvpnkit`."""

from pyvpnkit.entry import run

run()
