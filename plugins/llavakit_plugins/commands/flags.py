"""Flags that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.contracts.errors import LlavaError, ModelError

if TYPE_CHECKING:
    from llavakit import LlavaModel
    from llavakit.contracts.model import Sampling


def add_settings(command: argparse.ArgumentParser, sentence: str) -> None:
    """Add `--set`, which may be given more than once; `sentence` says what it changes."""
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=sentence)


def table_of(assignments: Sequence[str]) -> dict[str, Any]:
    """Return what `part.option=value` say, as tables of options."""
    from llavakit import set_key

    table: dict[str, Any] = {}
    for assignment in assignments:
        if "." not in assignment.partition("=")[0]:
            raise LlavaError(f"--set {assignment}: write it as part.option=value")
        set_key(table, assignment)
    return table


def add_model(command: argparse.ArgumentParser, name: str) -> None:
    """Add the model to load, and what some layouts leave out of its folder."""
    command.add_argument(name, type=Path, help="a model folder of any layout, or a name on the hub")
    add_left_out(command)


def add_left_out(command: argparse.ArgumentParser) -> None:
    """Add what some layouts leave out of a model's folder."""
    group = command.add_argument_group("what a layout may leave out (docs/layouts.md)")
    group.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the language model of an adapter, projector or delta",
    )
    group.add_argument("--vision", type=Path, metavar="DIR", help="the vision encoder")
    group.add_argument("--template", metavar="NAME", help="the prompt template")


_SAMPLING: tuple[tuple[str, type, float, str], ...] = (
    ("temperature", float, 0.0, "0 is greedy (default)"),
    ("top-p", float, 1.0, "among the likeliest tokens of this probability"),
    ("top-k", int, 0, "among so many of the likeliest; 0: all"),
    ("min-p", float, 0.0, "among those of this share of the likeliest's probability"),
    ("repetition-penalty", float, 1.0, "divides what was read or written"),
    ("frequency-penalty", float, 0.0, "for each time that a token was written"),
    ("presence-penalty", float, 0.0, "for tokens that were written"),
)


def add_sampling(command: argparse.ArgumentParser, seed: int | None = None) -> None:
    """Add the flags of how tokens are chosen and where an answer ends, but for its length."""
    group = command.add_argument_group("how tokens are chosen")
    for name, kind, usual, sentence in _SAMPLING:
        group.add_argument(f"--{name}", type=kind, default=usual, metavar="X", help=sentence)
    group.add_argument("--seed", type=int, default=seed, help="for a temperature above 0")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer"
    )


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """Return what the flags of `add_sampling`, and `--max-new-tokens`, say."""
    from llavakit.contracts.model import Sampling

    names = [name.replace("-", "_") for name, *_ in _SAMPLING]
    stated = {name: getattr(arguments, name) for name in (*names, "max_new_tokens", "seed")}
    return Sampling(**stated, stop=tuple(arguments.stop))


def load_model(
    path: Path,
    arguments: argparse.Namespace,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return the model at `path`, with what `add_model` has added."""
    left_out = (arguments.base, arguments.vision, arguments.template, options)
    if device in ("auto", "cpu", "cuda") and not any(left_out):
        from llavakit_plugins.onnx import runtime

        if runtime.recognises(path):  # first: all other layouts need torch, which takes seconds
            return runtime.load(path, device=device)
    if arguments.program:
        from llavakit_plugins.commands.importing import import_parts

        import_parts(path)
    import llavakit

    return llavakit.load(
        path,
        device=device,
        base=arguments.base,
        vision=arguments.vision,
        template=arguments.template,
        options=options,
    )


def load_weights(path: Path, arguments: argparse.Namespace, otherwise: str) -> LlavaModel:
    """Return the model at `path`, as `load_model` does.

    Raises ModelError for a layout that can only be run; `otherwise` says what cannot be done with
    it, and the remedy.
    """
    from llavakit import LlavaModel

    model = load_model(path, arguments)
    if not isinstance(model, LlavaModel):
        raise ModelError(f"{path} can be run but {otherwise}")
    return model


def refuse_to_replace(folder: Path) -> None:
    """Raise ModelError for a folder that holds something: writing would replace it whole."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ModelError(f"{folder} is there already; name a new folder, or remove that one")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder to write while the block makes it.

    Raises ModelError where it holds something already, or another process writes it.
    """
    from filelock import FileLock, Timeout  # slow to import

    from llavakit import explain_write

    path = folder.absolute()
    file = path.with_name(f".{path.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    with explain_write(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(file).acquire(timeout=0)
        except Timeout:
            raise ModelError(
                f"another llava-run is writing {folder}; wait for it, or name another folder"
            ) from None
    with lock:
        try:
            refuse_to_replace(folder)
            yield
        finally:
            with suppress(OSError):  # folders that hold something stay
                file.unlink()
                for parent in made:
                    parent.rmdir()


def refuse_to_mix(out: Path, *sources: Path | None) -> None:
    """Raise ModelError for a folder to write that is one of those to read, or lies inside one."""
    for source in sources:
        # a name on the hub is no folder; links are followed, as one may lead into the other
        if source is not None and source.is_dir() and lies_in(out, source):
            where = (
                f"lies inside {source}" if out.resolve() != source.resolve() else "is the source"
            )
            raise ModelError(
                f"{out} {where}, which is read and must stay as it is; name a folder outside of it"
            )


def lies_in(path: Path, folder: Path) -> bool:
    """Say whether a path is a folder or lies inside it, links followed."""
    return path.resolve().is_relative_to(folder.resolve())
