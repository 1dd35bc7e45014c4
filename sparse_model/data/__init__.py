"""Text: sources, corpus, tokenizer, order of batches."""
