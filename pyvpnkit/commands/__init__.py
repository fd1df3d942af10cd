"""Commands that talk to a running daemon."""
