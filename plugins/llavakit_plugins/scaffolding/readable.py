"""Checks a converted recipe before it is written, and says what is wrong by the script's flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from llavakit import (
    Checker,
    Key,
    ModelRecipe,
    Recipe,
    RecipeError,
    Registry,
    boundless,
    problems_in,
)
from llavakit_plugins.scaffolding.names import NAMES
from llavakit_plugins.scaffolding.scripts import Command


def refuse_unreadable(
    recipe: Mapping[str, Any], commands: Sequence[Command], models: Sequence[Mapping[str, Any]]
) -> None:
    """Raise RecipeError for a recipe that could not be read, with a sentence on each problem.

    `commands` are those its steps were made of, with the flags that went into it, and `models` the
    parts each of them names: where a step starts from a folder, `changes` has options of these.
    """
    checker = Checker(Registry.installed(), inputs=False)
    problems = list(boundless(recipe))
    if not problems:
        try:
            problems += checker.check(Recipe(**recipe), (), {})
        except ValidationError as error:
            problems += problems_in(error, Recipe)
    sentences = []
    for problem in problems:
        step = problem.key[1] if problem.key[:1] == ("steps",) and len(problem.key) > 1 else -1
        sentences.append(_sentence(commands[int(step)], problem.key, problem.message, problem.hint))
    if "model" not in recipe:  # `changes` are checked only when their model is there
        for command, model in zip(commands, models, strict=True):
            language = ModelRecipe(**model).language
            for problem in checker.check(language, ("model", "language"), {}):
                sentences.append(_sentence(command, problem.key, problem.message, problem.hint))
    if sentences:
        raise RecipeError("\n".join(dict.fromkeys(sentences)))


def _sentence(command: Command, key: Key, message: str, hint: str) -> str:
    flags = [f"--{flag} {value:.80}" for flag, value in command.flags.items() if _leads(flag, key)]
    said = [", ".join(flags), message] if flags else [message, hint]  # the hint has the value
    problem = ": ".join(filter(None, said))
    return f"{command.where}: {problem}; no recipe can say so: change the script"


def _leads(flag: str, key: Key) -> bool:
    """Say whether what a flag says stands at this key, above it, or below it."""
    ours = NAMES[flag].ours.split(".") if flag in NAMES else [""]
    tails = [[str(part) for part in key[at:]] for at in range(len(key))]
    return any(tail[: len(ours)] == ours[: len(tail)] for tail in tails)
