"""The host's own network: its addresses and routes, what happens to them, and whether it suits a virtual network."""
