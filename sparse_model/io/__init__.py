"""Reading and writing: atomic files, tensors on disk."""
