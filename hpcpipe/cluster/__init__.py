"""The machine: its processor and memory, what Slurm granted, and how ranks are started on it."""
