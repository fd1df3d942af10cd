"""LinuxKit's YAML: its schema, what image labels add to it, and which vsock ports the services of a machine take."""
