"""Hydra finds its plugins here; everything they do lives in the package nemo_dist_conf."""
