"""A model cut into pipeline stages: the trial that finds how, what a stage holds, and how it runs."""
