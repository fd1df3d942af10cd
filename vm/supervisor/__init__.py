"""One process for each machine: it starts everything in order, watches it, and takes it down again (spec companions 5)."""
