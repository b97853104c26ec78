"""`llava-run predict`: answers a file of questions, by a model or by a service."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit.contracts.commands import Commands
from llavakit.contracts.errors import LlavaError
from llavakit_plugins.commands.flags import (
    add_left_out,
    add_sampling,
    add_settings,
    load_model,
    sampling_of,
    table_of,
)

if TYPE_CHECKING:
    from llavakit import Question
    from llavakit.contracts.model import Sampling
    from llavakit.contracts.run import ProcessGroup, Progress
    from llavakit_plugins.chat_models.openai import OpenAI
    from llavakit_plugins.evaluation.predicting import Job


def add(commands: Commands) -> None:
    predict = commands.add_parser("predict", help="answer a file of questions")
    predict.add_argument(
        "model",
        help="a model folder of any layout, a name on the hub, or the address of a service that "
        "speaks OpenAI's protocol, such as http://localhost:8000/v1",
    )
    predict.add_argument(
        "file",
        help="questions: LLaVA's JSON lines, rows with `messages` or `conversations`, or what "
        "--dataset reads",
    )
    predict.add_argument("out", type=Path, help="the file of answers to write (JSON lines)")
    predict.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images")
    predict.add_argument("--limit", type=int, metavar="N", help="only so many from the start")
    predict.add_argument("--dataset", metavar="NAME", help="the data set that reads FILE")
    predict.add_argument(
        "--data", action="append", default=[], metavar="NAME=VALUE", help="its other options"
    )
    predict.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    predict.add_argument("--batch-size", type=int, default=16, metavar="N")
    predict.add_argument(
        "--workers", type=int, default=2, metavar="N", help="threads that prepare images (2)"
    )
    predict.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the batches on a CPU, each with one thread (1)",
    )
    predict.add_argument("--device", default="auto")
    predict.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests to a service at once"
    )
    predict.add_argument(
        "--budget-usd", type=float, metavar="USD", help="most that a service may cost"
    )
    predict.add_argument("--model-id", metavar="NAME", help="what the answers call the model")
    add_sampling(predict, seed=0)
    add_left_out(predict)
    add_settings(
        predict,
        "an option of a part (language.quantize=nf4), or of the chat model `openai` for a service "
        "(model=NAME, key_env=NAME, keyless=true)",
    )
    predict.set_defaults(command=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from llavakit import join_process_group, say
    from llavakit.contracts.run import Stopped

    least = min(arguments.batch_size, arguments.processes, arguments.concurrency)
    if min(least, 1 if arguments.limit is None else arguments.limit) < 1:
        raise LlavaError("--batch-size, --processes, --concurrency and --limit are 1 or more")
    if arguments.workers < 0:
        raise LlavaError("--workers is 0 or more")
    sampling = sampling_of(arguments)
    service = re.match(r"https?://", arguments.model, re.IGNORECASE) is not None
    with (
        join_process_group("cpu" if service else arguments.device) as (group, device),
        _watched(group) as (progress, stopping),
    ):
        try:
            questions = _questions(arguments, progress)
            if not service:
                place = str(device.find())
                _by_model(arguments, questions, sampling, place, group, progress, stopping)
            elif group.size > 1:
                raise LlavaError("a service is asked by one process; leave torchrun out")
            else:
                _by_service(arguments, questions, sampling, progress, stopping)
        except Stopped:
            if group.is_main:
                say("stopped; what was answered is kept, and the same command goes on with it")
            return 130
    return 0


@contextmanager
def _watched(group: ProcessGroup) -> Iterator[tuple[Progress, Callable[[], bool]]]:
    """Yield what shows the progress of the main process, and says whether all are to stop."""
    from llavakit import interrupts, show_progress

    with interrupts(group) as asked:
        if not group.is_main:
            yield (lambda done, total, note="": None), (lambda: group.any(asked()))
            return
        with show_progress("predict") as progress:
            yield progress, lambda: group.any(asked())


def _questions(arguments: argparse.Namespace, progress: Progress) -> Sequence[Question]:
    from llavakit import Dataset, Registry
    from llavakit_plugins.commands.options import build_from
    from llavakit_plugins.datasets.huggingface import reader_of
    from llavakit_plugins.evaluation.question_files import of_dataset, of_file

    named = arguments.dataset or reader_of(arguments.file)
    if arguments.dataset is None and named == "conversations":
        if arguments.data:
            raise LlavaError("--data states options of a data set; name it with --dataset")
        path = Path(arguments.file)
        if not path.exists():
            raise LlavaError(f"{path} does not exist; check its spelling")
        return of_file(path, arguments.images, arguments.limit)
    registry = Registry.installed()
    reader = registry.get(Dataset, named)
    flags: dict[str, Any] = {"path": arguments.file}
    if arguments.images is not None:
        flags["images"] = str(arguments.images)
    data = build_from(reader, arguments.data, registry, flags)
    return of_dataset(data, arguments.file, arguments.limit)


def _job(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    name: str,
    metadata: dict[str, Any],
    settings: dict[str, Any],
) -> Job | None:
    """Return the job, or None where it is done already."""
    from llavakit import say
    from llavakit_plugins.evaluation.predicting import Job

    job = Job(arguments.out, arguments.model_id or name, metadata, settings)
    if job.done_before(questions):
        say(f"{job.out}: done before")
        return None
    return job


def _by_model(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    sampling: Sampling,
    device: str,
    group: ProcessGroup,
    progress: Progress,
    stopping: Callable[[], bool],
) -> None:
    from contextlib import ExitStack

    from llavakit_plugins.evaluation.answering import Pace
    from llavakit_plugins.evaluation.predicting import fingerprint, predict

    path = Path(arguments.model)
    stated = _stated(sampling)
    settings = {
        "model": arguments.model,
        # a model that was trained on or replaced in its folder must not go on with old answers
        "files of the model": fingerprint(path) if path.is_dir() else "",
        "sampling": stated,
        "parts": [str(arguments.base), str(arguments.vision), arguments.template, *arguments.set],
    }
    if sampling.temperature > 0:  # what is drawn depends on the batch
        settings["batch size"] = arguments.batch_size
    job = _job(arguments, questions, arguments.model, stated, settings) if group.is_main else None
    # the main process alone looks at the files, and all do what it has found
    job = group.broadcast(job)
    if job is None:
        return
    options = table_of(arguments.set)
    with ExitStack() as stack:
        if group.is_main:
            # one writer: another process of this command would otherwise write to the same folder
            stack.enter_context(job.working())
        model = load_model(path, arguments, device, options)
        pace = Pace(arguments.batch_size, arguments.workers, arguments.processes)
        predict(
            model,
            questions,
            job,
            sampling,
            pace,
            process_group=group,
            progress=progress,
            stopping=stopping,
        )


def _by_service(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    sampling: Sampling,
    progress: Progress,
    stopping: Callable[[], bool],
) -> None:
    from llavakit_plugins.evaluation.predicting import predict_by_service, requests_of

    chat = _chat(arguments, sampling)
    name = chat.options.model
    stated = _stated(sampling)
    settings = {"service": arguments.model, "chat model": chat.identity}
    job = _job(arguments, questions, name, stated, settings)
    if job is None:
        return
    with job.working():
        predict_by_service(
            chat,
            questions,
            lambda: requests_of(questions),
            job,
            concurrency=arguments.concurrency,
            budget_usd=arguments.budget_usd,
            progress=progress,
            stopping=stopping,
        )


def _chat(arguments: argparse.Namespace, sampling: Sampling) -> OpenAI:
    """Return the chat model at the address; where it is not named, the only one that is there."""
    from llavakit import Registry
    from llavakit_plugins.chat_models.openai import OpenAI
    from llavakit_plugins.commands.options import build_from

    left_out = (arguments.base, arguments.vision, arguments.template)
    if any(value is not None for value in left_out):
        raise LlavaError("--base, --vision and --template are of a model folder, not of a service")
    registry = Registry.installed()
    flags: dict[str, Any] = {
        "base_url": arguments.model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        flags |= {"top_p": sampling.top_p, "seed": sampling.seed}
    known = ("max_new_tokens", "temperature", "top_p", "seed")
    if extra := {key: value for key, value in _stated(sampling).items() if key not in known}:
        flags["extra"] = extra  # OpenAI's own fields, and those that vLLM and others add
    # a server such as vLLM or llama.cpp serves one model, whose name nobody should have to type
    named = any(setting.partition("=")[0].strip() == "model" for setting in arguments.set)
    chat = build_from(OpenAI, arguments.set, registry, flags | ({} if named else {"model": "?"}))
    if not named:
        served = chat.served()
        if len(served) != 1:
            there = (
                f"it serves {', '.join(served[:20])}"
                if served
                else "it lists none: see that it runs there, and that its key is in the "
                "environment (OPENAI_API_KEY, or --set key_env=NAME)"
            )
            raise LlavaError(f"{arguments.model}: name the model with --set model=NAME; {there}")
        chat = build_from(OpenAI, arguments.set, registry, flags | {"model": served[0]})
    return chat


def _stated(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling as an answer's metadata have it: what decides nothing is left out."""
    table = asdict(sampling)
    usual = asdict(type(sampling)())
    # greedy answers do not depend on a seed, and two files that differ in it alone are the same
    kept = ("max_new_tokens", "temperature")
    if sampling.temperature == 0:
        table["seed"] = None
    table["stop"], usual["stop"] = list(sampling.stop), []
    return {key: value for key, value in table.items() if key in kept or value != usual[key]}
