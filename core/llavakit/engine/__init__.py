"""Runs a recipe: steps in their folders, what is done already, what an interrupted run left."""
