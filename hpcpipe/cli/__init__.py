"""The commands, one file per verb; importing them is cheap, heavy imports stand inside the functions."""
