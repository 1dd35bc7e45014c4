"""Finding the channel that means something."""
