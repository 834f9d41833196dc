"""Try a user's models and loss terms before a run: what would not be right is refused by name."""
