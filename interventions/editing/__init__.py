"""`intervene()` and its handle."""
