"""One run for all ranks: where they meet, the config tree they share, the logs they keep apart."""
