"""The guest's time from the host's clock: a small NTP server (RFC 5905) for the gateway's port 123."""
