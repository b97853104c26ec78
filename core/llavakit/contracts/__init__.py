"""What a plugin implements and what it is handed. Nothing here imports the rest of the core."""
