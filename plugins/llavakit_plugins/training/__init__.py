"""Training by recipe: batches of the packed stream, optimiser, checkpoints, the loop."""
