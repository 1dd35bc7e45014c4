"""Interventions on a dense model through a weight-sparse one: named channels, intervene(), circuits, steering."""

from interventions.bundle.bundle import load_dense, load_hf
from interventions.bundle.channels import Channel
from interventions.editing.intervene import Intervention, intervene, intervene_vector

__all__ = ["Channel", "Intervention", "intervene", "intervene_vector", "load_dense", "load_hf"]
