"""What each strategy costs: one file a strategy, named by ``costs`` in the strategy's row."""
