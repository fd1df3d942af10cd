"""UDP without I/O: the mappings of guest sources and the frames of replies."""
