"""Steering experiments with their controls."""
