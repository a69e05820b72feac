"""One module, or one folder, a technique: what it does to a model, whatever the strategy."""
