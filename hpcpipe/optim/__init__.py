"""The optimizer: learning rate, gradient sums and clipping, AdamW."""
