"""Choosing captions for stage 1: the files they come in, noun phrases, and the balanced choice."""
