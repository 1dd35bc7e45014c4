"""Top-k in all its forms: AbsTopK activations, the weight projection, products with few nonzeros."""
