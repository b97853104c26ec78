"""Runs a recipe: steps in their folders, what is done already, what an interrupted run left.

runner         the steps, one after another, in one process or several
checked_data   data sets, built before the first step
step_folders   what a step's folder says: begun, done, of which recipe
step_models    the model that a step is given
reuse          finished steps taken from another run
environment    recipe.toml and environment.json
interrupts     Ctrl-C and SIGTERM
"""
