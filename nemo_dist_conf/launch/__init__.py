"""The torchrun launcher: a sweep whose jobs run as N ranks each, on torch elastic."""
