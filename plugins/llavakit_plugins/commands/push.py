"""`llava-run push`: puts a model on Hugging Face's hub, with a card made of its run."""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import ModelError
from llavakit_plugins.commands.flags import add_model, lies_in, load_weights


def add(commands: Commands) -> None:
    push = commands.add_parser("push", help="put a model on Hugging Face's hub")
    add_model(push, "model")
    push.add_argument("name", help="its name there: owner/model")
    push.add_argument("--private", action="store_true", help="make it private, if it is new")
    push.add_argument(
        "--format",
        action="append",
        metavar="NAME",
        help="a layout to send, more than once: the first is the repository's own, each other one "
        "has a folder (hf)",
    )
    push.add_argument("--as-is", action="store_true", help="send the folder's own files instead")
    push.add_argument("--licence", metavar="NAME", help="of the model, by the hub's short name")
    push.add_argument(
        "--staging",
        type=Path,
        metavar="DIR",
        help="where files are laid out (beside the model)",
    )
    push.set_defaults(command=_push)


def _push(arguments: argparse.Namespace) -> int:
    import shutil

    from llavakit import Registry, Use, new_folder, shown, write_text
    from llavakit.contracts.interfaces import Exporter
    from llavakit_plugins.evaluation.predicting import fingerprint
    from llavakit_plugins.publishing.card import read_story, write_card
    from llavakit_plugins.publishing.layouts import close_staging, lay_out, open_staging
    from llavakit_plugins.publishing.push import check_name, missing_token, send_folder

    try:
        name = check_name(arguments.name)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if problem := missing_token():  # before anything is written
        raise ModelError(problem)
    story = read_story(arguments.model)
    # beside the model and not in the system's temporary folder, which may be too small for a model
    beside = arguments.model.absolute().parent / f".push-{name.replace('/', '--')}"
    staging: Path = arguments.staging or beside
    if lies_in(staging, arguments.model):
        raise ModelError(f"{staging} lies in the model's folder; name a place beside it")
    if arguments.as_is and not arguments.model.is_dir():
        raise ModelError(f"{arguments.model} is no folder; leave out --as-is")
    uses = arguments.format or ["hf"]
    content = {
        "model": str(arguments.model.resolve()),
        "files": fingerprint(arguments.model) if arguments.model.is_dir() else "",
        "formats": None if arguments.as_is else uses,
    }
    folder = open_staging(staging, content)
    if arguments.as_is:
        if not folder.exists():
            with new_folder(folder) as partial:
                shutil.copytree(arguments.model, partial, dirs_exist_ok=True)
        found = [n for n, e in Registry.installed().all(Exporter).items() if e.recognises(folder)]
        # the card says how to load the files: by the layout that recognises them
        layouts = {found[0] if found else "llavakit": ""}
    else:
        registry = Registry.installed()
        exporters = [registry.build(Use[Exporter](use=use)) for use in uses]
        otherwise = "not written in another layout; add --as-is"
        model = load_weights(arguments.model, arguments, otherwise)
        layouts = lay_out(model, exporters, folder)
    write_text(folder / "README.md", write_card(name, story, layouts, arguments.licence))
    message = f"{name.rpartition('/')[2]}, by llava-run push"
    address = send_folder(folder, name, private=arguments.private, message=message)
    close_staging(staging)
    print(shown(f"pushed: {address}"))
    return 0
