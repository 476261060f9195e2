"""What a run tells: the files in its directory that people script against, and what the terminal shows."""
