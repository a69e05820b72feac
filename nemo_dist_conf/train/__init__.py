"""The recipe: ``python -m nemo_dist_conf.train`` trains a causal language model on text."""
