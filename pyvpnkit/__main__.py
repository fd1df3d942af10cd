"""`python -m pyvpnkit` is the command `pyvpnkit`."""

from pyvpnkit.cli import run

run()
