"""Expert parallelism, and how tokens spread over experts."""
