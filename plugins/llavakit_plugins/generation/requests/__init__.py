"""Sends many requests to a chat model, at a known price, without losing a paid reply."""
