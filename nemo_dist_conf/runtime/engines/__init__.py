"""One engine a strategy: how it shards a model, accumulates, clips and hands over its state."""
