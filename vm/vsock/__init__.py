"""vsock: our vhost-user device for any hypervisor that shares its memory, and one API over what others offer (`api`)."""
