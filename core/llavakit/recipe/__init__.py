"""Recipes: what a TOML file says, checked, each problem at its line."""
