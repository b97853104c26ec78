"""Asking a chat model for much, at a known price, with nothing paid for lost."""
