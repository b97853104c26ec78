"""What the checkpoint layouts share: weight files, parts, image settings, prompts, parity."""
