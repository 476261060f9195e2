"""Memory: blocks that are planned once and cut into named arrays."""
