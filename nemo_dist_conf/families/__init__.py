"""What is known of model families: shapes, plans as style names, and the rules that need them. No torch."""
