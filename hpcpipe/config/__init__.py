"""The configuration: its schema, reading it, checking it across keys, and writing it back."""
