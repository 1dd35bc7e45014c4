"""Circuits by pruning, and their controls."""
