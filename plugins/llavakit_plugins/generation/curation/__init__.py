"""Chooses captions for stage 1: reading their files, noun phrases, and the balanced choice."""
