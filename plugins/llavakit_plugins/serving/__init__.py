"""Serves a model over HTTP to many clients at once, as OpenAI's chat completions have it."""
