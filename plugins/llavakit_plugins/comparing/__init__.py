"""Compares finished runs: recipes side by side, over their seeds, with what the paper has."""
