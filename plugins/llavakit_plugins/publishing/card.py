"""The card of a model, made of its run: recipe, data, figures, how to load it, licences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit import RecipeError, redact
from llavakit_plugins.reporting.run_folder import RECORD, RunFolder, read_record, read_run

_LICENCES = {  # of the parts that recipes name, by the beginning of their names on the hub
    "openai/clip": "mit",
    "google/siglip": "apache-2.0",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "lmsys/vicuna": "LLaMA's, for research only",
    "meta-llama/Llama-2": "llama2",
    "Qwen/Qwen2.5-3B": "qwen-research",
    "Qwen/Qwen2.5-72B": "qwen",
    "Qwen/Qwen2.5": "apache-2.0",
    "HuggingFaceTB/SmolLM": "apache-2.0",
    "microsoft/phi": "mit",
}
_WHERE = 3  # folders above a model in which its run is looked for

_TRANSFORMERS = """\
```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}")
turn = {{"role": "user", "content": [
    {{"type": "image", "path": "photo.jpg"}},
    {{"type": "text", "text": "What is in the picture?"}},
]}}
print(ask(text=[turn], max_new_tokens=64)[0]["generated_text"])
```
"""
_HERE = """\
```python
import llavakit
{find}
model = llavakit.load({where})
print(model.generate("What is in the picture?", images=["photo.jpg"], max_new_tokens=64))
```
"""


@dataclass(frozen=True)
class Story:
    """What is known of how a model was made."""

    run: RunFolder | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  #: By step.


def read_story(folder: Path) -> Story:
    """Return what the run around a model's folder says; empty where there is none."""
    for place in [folder, *folder.absolute().parents][: _WHERE + 1]:
        with suppress(RecipeError):
            run = read_run(place)
            finished = [step for step in run.steps if (place / step / RECORD).is_file()]
            return Story(run, {step: read_record(place / step).metrics for step in finished})
    return Story()


def write_card(
    name: str, story: Story, layouts: Mapping[str, str], licence: str | None = None
) -> str:
    """Return README.md of a model called `name` on the hub.

    `layouts` names the folder of each layout, "" for the repository itself.
    """
    from huggingface_hub import ModelCardData

    sources = dict(_sources(story))
    licences = {part: _licence(source) for part, source in sources.items()}
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=licence or _common(list(licences.values())),
        library_name="transformers" if layouts.get("hf") == "" else "llavakit",
        pipeline_tag="image-text-to-text",
        tags=sorted({"llava", "llavakit", *(["onnx"] if "onnx" in layouts else [])}),
        # names on the hub alone: a path of this machine would mean nothing there
        base_model=[source for source in sources.values() if _is_on_hub(source)] or None,
        eval_results=list(_results(story)) or None,
    )
    body = [
        f"# {name.rpartition('/')[2]}",
        "A LLaVA: a vision encoder, a connector and a language model, made with "
        "[llavakit](https://github.com/llavakit/llavakit).",
        "## Use",
        *_uses(name, layouts),
        *_tables(story),
        "## Licence",
        _licence_text(sources, licences),
        *_recipe(story),
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(body).rstrip() + "\n"


def _sources(story: Story) -> Iterator[tuple[str, str]]:
    model = story.run.recipe.get("model", {}) if story.run else {}
    for part in ("vision", "language"):
        source = model.get(part, {}).get("source") or model.get(part, {}).get("model")
        if isinstance(source, str):
            yield part, source


def _is_on_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "@", "~"))


def _shown(source: str) -> str:
    return source if _is_on_hub(source) else Path(source).name  # nobody else has that folder


def _licence(source: str) -> str | None:
    return next((known for name, known in _LICENCES.items() if source.startswith(name)), None)


def _common(licences: Sequence[str | None]) -> str:
    """Return the licence that all parts have, where that is one and known."""
    return licences[0] if licences and licences[0] and len({*licences}) == 1 else "other"


def _licence_text(sources: Mapping[str, str], licences: Mapping[str, str | None]) -> str:
    lines = [
        f"- {part}: `{_shown(source)}`, {licences[part] or 'see its own page'}"
        for part, source in sources.items()
    ]
    lines.append(
        "- training data: their own terms hold; LLaVA's instruction data are CC BY 4.0, and what "
        "was written by a service is bound by that service's terms"
    )
    return "The model may be used as far as the licences of all that it is made of allow.\n\n" + (
        "\n".join(lines)
    )


def _results(story: Story) -> Iterator[Any]:
    """Yield the figures of the benchmarks that the run was evaluated on, as the hub lists them."""
    from huggingface_hub import EvalResult

    for step, metrics in story.metrics.items():
        uses = story.run.steps[step].get("benchmarks", []) if story.run else []
        for name, value in metrics.items():
            prefixed = [use["use"] for use in uses if name.startswith(f"{use['use']}_")]
            # figures of a step's only benchmark do not say its name
            benchmark = max(prefixed, key=len) if prefixed else uses[0]["use"] if uses else None
            if benchmark is None or not (prefixed or len(uses) == 1):
                continue
            yield EvalResult(
                task_type="image-text-to-text",
                dataset_type=benchmark,
                dataset_name=benchmark,
                metric_type=name.removeprefix(f"{benchmark}_"),
                metric_value=value,
            )


def _uses(name: str, layouts: Mapping[str, str]) -> Iterator[str]:
    if layouts.get("hf") == "":
        yield "With transformers:"
        yield _TRANSFORMERS.format(name=name).strip()
    for layout, folder in layouts.items():
        if folder == "" and layout in ("hf", "original"):
            yield "With llavakit:"
            yield _HERE.format(find="", where=f'"{name}"').strip()
            continue
        place = f'"/{folder}"' if folder else ""
        find = (
            "from huggingface_hub import snapshot_download\n\n"
            f'folder = snapshot_download("{name}"'
            + (f', allow_patterns="{folder}/*")' if folder else ")")
        )
        yield f"In the layout `{layout}`, with llavakit:"
        yield _HERE.format(find=find, where=f"folder + {place}" if folder else "folder").strip()


def _tables(story: Story) -> Iterator[str]:
    rows = [
        f"| {step} | {metric} | {value:,.6g} |"
        for step, metrics in story.metrics.items()
        for metric, value in metrics.items()
    ]
    if rows:
        yield "## Figures"
        yield "\n".join(["| step | metric | value |", "|---|---|---|", *rows])


def _recipe(story: Story) -> Iterator[str]:
    if story.run is None:
        return
    import tomli_w

    yield "## Recipe"
    yield (
        "Save it as a file, and `llava-run FILE` makes the model again. The data are what its "
        "steps name as `data`, `contexts` or `captions`."
    )
    # the card is public: nothing secret may be in it, and no fence that would end the block
    text = redact(tomli_w.dumps(dict(story.run.recipe))).replace("```", "'''")
    yield f"```toml\n{text}```"
