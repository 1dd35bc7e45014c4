"""The twenty tasks of the paper."""
