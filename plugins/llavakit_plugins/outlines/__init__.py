"""Plans without PyTorch: the shapes of the built-in networks, by arithmetic."""
