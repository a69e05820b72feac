"""A model before it is parallelised: built without values, its blocks found, its tensors filled by name."""
