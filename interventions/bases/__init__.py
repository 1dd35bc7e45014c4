"""Steering through the sparse model's channels beside other bases of the same dense site."""
