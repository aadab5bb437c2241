"""Text to batches: sources, tokenizers, datasets, batch sampler, statistics and baselines."""
