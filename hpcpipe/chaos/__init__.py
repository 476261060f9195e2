"""The fault matrix: faults, what is expected of a run that meets them, and what was seen."""
