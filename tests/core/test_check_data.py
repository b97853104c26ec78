"""`llava-run check-data`: everything that is wrong with data, at once, before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.core.conftest import Command

from llavakit import Dataset, Registry, Use
from llavakit.testing import byte_tokenizer
from llavakit_plugins.datasets.inspection import Lengths, inspect_data

LLAMA = Path(__file__).parents[3] / "shared" / "data" / "tokenizer" / "llama2.model"


def row(identity: object, *turns: str, image: object = None, roles: str = "") -> dict[str, Any]:
    """A row of turns by human and gpt in turn, or as `roles` has it (h, g, s)."""
    names = {"h": "human", "g": "gpt", "s": "system"}
    roles = roles or "hg" * len(turns)
    made: dict[str, Any] = {"id": identity}
    if image is not None:
        made["image"] = image
    made["conversations"] = [
        {"from": names[role], "value": text} for role, text in zip(roles, turns, strict=False)
    ]
    return made


GOOD = [
    row("prefix", "<image>\nwhat ?", "red .", image="a.png"),
    row("suffix", "what ?\n<image>", "blue .", "sure ?", "yes .", image="b.png"),
    {**row("sharegpt", "hello", "hi ."), "model": "gpt-4"},
    row("two", "<image> or <image> ?", "the first .", image=["a.png", "c.png"]),
    row("gpt first", "hi", "<image>\nwhat ?", "red .", image="a.png", roles="ghg"),
    row(12, "a number for an id", "fine ."),
]
BAD = [
    row("system", "be nice", "what ?", "red .", roles="shg"),
    row("twice human", "what ?", "well ?", "red .", roles="hhg"),
    row("in the answer", "<image>\nwhat ?", "an <image> tag", image="a.png"),
    row("collapsed", "<image> <image>\nwhat ?", "red .", image="a.png"),
    row("outside", "<image>", "red .", image="../a.png"),
    {"id": "none", "image": "gone.png"},
    row("missing", "<image>", "red .", image="gone.png"),
    row("broken", "<image>", "red .", image="cut.png"),
    row("unanswered", "what ?"),
]
SILENT = row("silent", "what ?", "   ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        Image.effect_noise((20, 20), 50).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return tmp_path


@pytest.fixture
def check(folder: Path, llava_run: Command) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """A function that checks these rows; returns exit code, report, and what stderr says."""

    def call(rows: list[Any] | str, *more: object) -> tuple[int, dict[str, Any], str]:
        path = folder / "rows.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        code, out, err = llava_run("check-data", path, "--images", folder, "--json", *more)
        return code, json.loads(out), err

    return call


Check = Callable[..., tuple[int, dict[str, Any], str]]


def test_halves_of_characters_are_shown(check: Check) -> None:
    """As JSON has them where a text was cut within an emoji; no terminal can print them."""
    code, report, _ = check([row("half \ud83d", "what ?", "red .", image="a\ud83d.png")])
    assert code == 2
    assert "a\ud83d.png" in json.dumps(report, ensure_ascii=False)


def test_good_data(check: Check) -> None:
    code, report, _ = check(GOOD)
    assert code == 0
    assert report["usable"]
    assert report["findings"] == []
    found = {name: report[name] for name in ("samples", "turns", "most_turns", "distinct_images")}
    assert found == {"samples": 6, "turns": 14, "most_turns": 4, "distinct_images": 3}
    assert (report["image_samples"], report["multi_image_samples"], report["text_samples"]) == (
        3,
        1,
        2,
    )
    assert report["images"] == 5
    assert report["counted_with"] == "characters (an estimate)"
    assert sum(report["tokens"]["counts"]) == 6


def test_everything_wrong_is_listed_with_its_sample(check: Check) -> None:
    code, report, err = check([*GOOD, *BAD, GOOD[0], SILENT])
    assert code == 2
    assert not report["usable"]
    found = {sort["sort"]: sort for sort in report["findings"]}
    named = {
        "conversations": ["system", "twice human", "in the answer", "collapsed", "none"],
        "image paths": ["outside"],
        "missing images": ["none"],  # the first that shows it
        "broken images": ["broken"],
        "nothing learned": ["unanswered"],
        "duplicate ids": ["prefix"],
        "empty answers": ["silent"],
    }
    assert found.keys() == named.keys()
    for sort, names in named.items():
        assert found[sort]["count"] == len(names), sort
        assert found[sort]["stops"] == (sort not in ("duplicate ids", "empty answers"))
        for name, message in zip(names, found[sort]["messages"], strict=True):
            assert f"`{name}`" in message
    assert "would stop a training: " in err
    assert "missing images (1)" in err
    assert "duplicate" not in err


def test_what_it_calls_usable_can_be_built_and_what_not_cannot(folder: Path, check: Check) -> None:
    from llavakit import DataError

    registry = Registry.installed()
    for rows, usable in ((GOOD, True), *(([*GOOD, bad], False) for bad in BAD[:-1])):
        code, _, _ = check(rows)
        places = {"path": str(folder / "rows.json"), "images": str(folder)}
        use = Use[Dataset].model_validate({"use": "conversations", **places})
        try:
            registry.build(use)
        except DataError:
            assert not usable
            assert code == 2
        else:
            assert usable
            assert code == 0


def test_a_broken_file_is_reported_with_what_came_before(check: Check) -> None:
    text = json.dumps(GOOD, indent=1)
    code, report, err = check(text[: len(text) // 2])
    assert code == 2
    assert report["samples"] == 2
    (finding,) = report["findings"]
    assert finding["sort"] == "file"
    assert "not valid JSON" in finding["messages"][0]
    assert "would stop a training: file (1)" in err


def test_tokens_are_those_of_the_template_and_tokenizer(tmp_path: Path, check: Check) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    rows = [
        row("short", "what ?", "red ."),
        row("image", "<image>\nwhat ?", "red .", image="a.png"),
        row("long", "what ?", "r" * 1000),
        row("behind", "w" * 1000, "red ."),
    ]
    more = ["--tokenizer", tmp_path / "bytes", "--visual-tokens", 16, "--max-length", 300]
    code, report, _ = check(rows, *more)
    text = 1 + 154 + len(" USER: what ? ASSISTANT: red .") + 1  # FACTS: the system text has 154
    assert report["tokens"]["total"] == 4 * text + 17 + 995 + 994
    assert report["tokens"]["longest"] == text + 995
    assert report["counted_with"] == "the tokenizer"
    assert report["cut"] == 2
    assert report["nothing_learned"] == 1
    assert code == 2
    learned = report["learned_tokens"]["total"]
    answers = 2 * (len("red .") + 1) + (300 - (text - len("red .") - 1))
    assert answers <= learned <= answers + 3  # the space in front of an answer may count
    code, report, _ = check(rows, *more, "--template", "plain")
    assert "prompt template" in {sort["sort"] for sort in report["findings"]}


@pytest.mark.skipif(not LLAMA.is_file(), reason="the real tokenizer is not beside the checkout")
def test_a_bare_sentencepiece_model_is_a_tokenizer(check: Check) -> None:
    from sentencepiece import SentencePieceProcessor

    _, report, _ = check(GOOD[2:3], "--tokenizer", LLAMA, "--template", "plain")
    assert report["findings"][0]["sort"] == "prompt template"  # plain needs an image
    _, report, _ = check(GOOD[:1], "--tokenizer", LLAMA, "--template", "plain")
    pieces = SentencePieceProcessor(model_file=str(LLAMA))
    assert report["tokens"]["total"] == 1 + 256 + len(pieces.encode("red .\n"))


def test_the_table_says_what_json_says(folder: Path, llava_run: Command) -> None:
    (folder / "rows.json").write_text(json.dumps([*GOOD, *BAD]))
    code, out, err = llava_run("check-data", folder / "rows.json", "--images", folder)
    assert code == 2
    for words in ("with several images", "missing images: 1 (stops a training)", "an estimate"):
        assert words in out
    assert "error: " in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.json"], "none.json does not exist"),
        (["rows.json", "--images", "nowhere"], "nowhere does not exist"),
        (["rows.json", "--template", "vicuna_v1"], "--template needs --tokenizer"),
        (["rows.json", "--max-length", "0"], "--max-length is 2 or more"),
        (["rows.json", "--tokenizer", "nobody/nothing"], "`nobody/nothing` gives no tokenizer"),
        (["rows.json", "--dataset", "conversation"], "did you mean `conversations`?"),
        (["rows.json", "--set", "limits=3"], "unknown option `limits`"),
    ],
)
def test_wrong_use(
    folder: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    (folder / "rows.json").write_text(json.dumps(GOOD))
    monkeypatch.chdir(folder)
    assert sentence in refused("check-data", *arguments)


def test_a_data_set_that_says_nothing_of_itself_is_looked_at_too(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(GOOD))
    part = {"use": "conversations", "path": str(folder / "rows.json"), "images": str(folder)}
    use = Use[Dataset].model_validate({"use": "mix", "parts": [part, part]})
    report = inspect_data(use, Registry.installed(), Lengths(), lambda *_: None)
    assert report.usable
    assert report.samples == 12
    assert report.duplicate_ids == 6
    assert report.distinct_images == 3
