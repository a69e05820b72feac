"""What is known of the recipe before it runs: its YAML, its keys and its rules. No torch."""
