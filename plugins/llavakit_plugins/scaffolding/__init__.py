"""New packages for plugins, and recipes of what other programs were told."""
