"""Puts models on Hugging Face's hub, with a card that says how each was made."""
