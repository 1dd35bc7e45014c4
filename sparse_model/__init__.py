"""Weight-sparse transformers: the model, its data, and its training."""
