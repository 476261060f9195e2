"""Training: what a run is made of, one step of it, the loop around it, and how it starts again."""
