"""Hugging Face: the hub, transformers' configurations and tokenizers."""
