"""Attention maps: where a model looks while it answers."""
