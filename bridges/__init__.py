"""Bridges between a frozen dense GPT-2 and a weight-sparse transformer: training, hybrids, evaluation."""
