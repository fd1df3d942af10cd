"""Pure decisions about new flows."""
