"""Commands of `llava-run`: what an entry point of the group `llavakit.commands` names.

    [project.entry-points."llavakit.commands"]
    count = "my_package.count:add"

    def add(commands: Commands) -> None:
        parser = commands.add_parser("count", help="count the samples of a file")
        parser.add_argument("file")
        parser.set_defaults(command=count)       # count(arguments) -> exit code

The function is called for `--help`, too, so its module imports nothing that takes long. A command
whose flags are known only when it runs sets the default `reads_flags=True`, and finds what the
parser did not know in `arguments.flags`. Errors that a user can fix are LlavaErrors: exit code 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

GROUP = "llavakit.commands"  #: The entry-point group; an entry point is called as its command.

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  #: Takes commands.

Add: TypeAlias = Callable[["Commands"], None]  #: Adds the command's parser.
