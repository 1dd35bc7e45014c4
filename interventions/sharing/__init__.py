"""A bundle for others: its files, its card, and the way to the hub."""
