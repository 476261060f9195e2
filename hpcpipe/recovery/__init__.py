"""What a run needs to go on without a rank: copies of its state in memory, and the plan that all survivors compute."""
