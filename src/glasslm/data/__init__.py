"""From text to batches: sources, tokenizers, token shards, the batch sampler, corpus statistics and baselines."""
