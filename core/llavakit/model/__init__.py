"""The model: its parts around one stream, its folder, and how it is asked."""
