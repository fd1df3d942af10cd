"""What flows look like from outside: records for listings, and names to ask for one."""
