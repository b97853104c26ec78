"""The packed stream: turns to tokens, tokens to micro-batches, attention within each sample."""
