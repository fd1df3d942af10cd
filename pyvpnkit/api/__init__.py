"""The control server: HTTP on `control.sock`."""
