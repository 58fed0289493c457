"""Turn conversations into packed batches: render, mask assistant tokens, cut, pack and shard."""
