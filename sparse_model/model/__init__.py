"""The weight-sparse transformer, its checkpoints and formats, and the names of its nodes."""
