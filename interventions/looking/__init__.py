"""Looking inside: sparse activations of any text, the top channels of a token, the top examples of a channel."""
