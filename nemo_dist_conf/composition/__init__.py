"""Hydra's side: groups and their options, a composed tree checked, the callback, one run for all ranks. No torch."""
