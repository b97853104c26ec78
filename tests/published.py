"""Published files that some tests read, and what stands in for those that are not there.

They are looked for in `../shared/data` beside the checkout, or in the folder that the environment
variable LLAVAKIT_TEST_DATA names; each kind has a folder in it:

    tokenizer/llama2.model                      LLaMA's 32,000 pieces, whole
    coco80/caps_boxes.jsonl                     captions and boxes of 60 images of COCO
    llava_bench_coco/questions.jsonl, gpt4_answers.jsonl        90 questions and GPT-4's answers
    scienceqa/problems.json, gpt3_outputs.json  180 problems of the test split, GPT-3's answers
    judge_reviews/NAME_vs_vicuna-13b.jsonl      80 reviews by GPT-4 of alpaca-13b and of bard
    captions/scienceqa_captions.jsonl           10,332 captions
    images/*.jpg                                photographs
"""

from __future__ import annotations

import atexit
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests import llama_like, own_data

VARIABLE = "LLAVAKIT_TEST_DATA"
FOLDER = Path(os.environ.get(VARIABLE) or Path(__file__).parents[2] / "shared" / "data").resolve()
_LLAMA = Path("tokenizer") / "llama2.model"
_LLAVA = "Apache-2.0 and CC BY 4.0, github.com/haotian-liu/LLaVA"
_SOURCES = {
    "tokenizer": "Llama 2 licence, tokenizer.model of huggingface.co/lmsys/vicuna-7b-v1.5",
    "scienceqa": "CC BY-NC-SA 4.0, github.com/lupantech/ScienceQA",
    "captions": "CC BY-NC-SA 4.0, github.com/lupantech/ScienceQA",
    "coco80": _LLAVA,
    "llava_bench_coco": _LLAVA,
    "judge_reviews": "Apache-2.0, github.com/lm-sys/FastChat",
    "images": _LLAVA,
}
"""The folder of each kind of file: its licence, and who publishes it."""
_SKIPPED = "needs the published"


def needs(*kinds: str) -> pytest.MarkDecorator:
    """Return a mark that leaves a test out where these kinds of files are not there."""
    lacking = [kind for kind in kinds if kind in missing()]
    return pytest.mark.skipif(bool(lacking), reason=f"{_SKIPPED} {', '.join(lacking)}")


def missing() -> list[str]:
    """Return the kinds of files that are not there."""
    there = {kind: FOLDER / kind for kind in _SOURCES} | {"tokenizer": FOLDER / _LLAMA}
    return [kind for kind, path in there.items() if not path.exists()]


@cache
def folder() -> Path:
    """Return a folder with every kind but the tokenizer; our own data where a kind is missing."""
    lacking = [kind for kind in missing() if kind != "tokenizer"]
    if not lacking:
        return FOLDER
    made = _temporary()
    for kind in _SOURCES.keys() - {"tokenizer"}:
        if kind in lacking:
            (made / kind).mkdir()
            own_data.write(kind, made / kind)
        else:
            (made / kind).symlink_to(FOLDER / kind)
    return made


@cache
def llama(*, published: bool | None = None) -> Path:
    """Return LLaMA's tokenizer.model, or one like it that is trained here.

    The published one where it is there, unless `published` says which.
    """
    if published is None:
        published = "tokenizer" not in missing()
    if published:
        return FOLDER / _LLAMA
    path = _temporary() / "tokenizer.model"
    path.write_bytes(llama_like.train())
    return path


def left_out(reasons: list[str]) -> str | None:
    """Return a line on the files that are missing; `reasons` are those of all tests left out."""
    if not (lacking := missing()):
        return None
    count = sum(_SKIPPED in reason for reason in reasons)
    sources: dict[str, list[str]] = {}
    for kind in lacking:
        sources.setdefault(_SOURCES[kind], []).append(kind)
    where = "; ".join(f"{', '.join(kinds)} ({source})" for source, kinds in sources.items())
    return (
        f"published files: {FOLDER} lacks {where}. Tests left out: {count}; others read data of "
        f"our own instead. {VARIABLE} names the folder of the files"
    )


def _temporary() -> Path:
    made = mkdtemp(prefix="llavakit-tests-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
