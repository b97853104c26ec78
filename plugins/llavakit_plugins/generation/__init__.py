"""Generating by a chat model: the job, its price, its files and its review page."""
