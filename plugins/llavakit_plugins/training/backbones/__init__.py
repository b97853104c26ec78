"""Backbones from nothing: a tokenizer, a contrastive CLIP and a causal language model on text."""
