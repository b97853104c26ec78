"""The concept-balanced filter against its rules, recomputed with dictionaries and sets."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests import published

from llavakit import DataError, Step
from llavakit.cli import main
from llavakit.testing import StepContract
from llavakit_plugins.generation.curation.captions import read_captions
from llavakit_plugins.generation.curation.concepts import Postings, choose
from llavakit_plugins.generation.curation.phrases import (
    light_phrases,
    phrases_of,
    without_determiners,
)
from llavakit_plugins.steps.filter import Filter, FilterOptions

SHARED = published.folder()
REAL = SHARED / "captions" / "scienceqa_captions.jsonl"

RECIPE = """\
name = "filtered"
seed = {seed}
[[steps]]
use = "filter"
captions = "{captions}"
workers = 2
{more}
"""


def run(folder: Path, captions: Path, more: str = "", seed: int = 5) -> Path:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(seed=seed, captions=captions, more=more))
    assert main([str(recipe), "--out", str(folder / "run")]) == 0
    return folder / "run" / "01-filter"


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestFilter(StepContract):
    @pytest.fixture(autouse=True)
    def _captions(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.file = tmp_path_factory.mktemp("data") / "captions.jsonl"
        lines = [{"id": str(n), "caption": f"a thing{n % 7} on a table"} for n in range(200)]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"captions": self.file, "workers": 1}

    def build(self) -> Step:
        return Filter(FilterOptions(captions=self.file, workers=1))


def test_the_rules_hold_exactly_on_real_captions(tmp_path: Path) -> None:
    minimum, most, seed = 3, 100, 5
    step = run(tmp_path, REAL, 'chunker = "light"', seed=seed)
    rows = rows_of(REAL)
    assert len(rows) == 10332
    # 1. count each phrase once a caption
    captions_of: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        for phrase in set(light_phrases(row["caption"])):
            captions_of[phrase].append(number)
    # 2. drop the rare ones, 3. go from rare to frequent, 4. of frequent ones a random hundred
    kept = {phrase: numbers for phrase, numbers in captions_of.items() if len(numbers) >= minimum}
    pool: set[int] = set()
    for phrase, numbers in sorted(kept.items(), key=lambda item: len(item[1])):
        if len(numbers) > most:
            mark = int.from_bytes(blake2b(phrase.encode(), digest_size=8).digest(), "little")
            picked = np.random.default_rng([seed, mark]).choice(len(numbers), most, replace=False)
            assert len(set(picked)) == most
            numbers = [numbers[place] for place in picked]
        pool.update(numbers)
    assert rows_of(step / "kept.jsonl") == [row for n, row in enumerate(rows) if n in pool]
    # and the table says how often each phrase stood before and stands after
    lines = (step / "phrases.tsv").read_text().splitlines()[1:]
    table = {phrase: (int(a), int(b)) for phrase, a, b in (line.split("\t") for line in lines)}
    assert table == {
        phrase: (len(numbers), len(pool.intersection(numbers))) for phrase, numbers in kept.items()
    }
    assert [int(line.split("\t")[1]) for line in lines] == sorted(map(len, kept.values()))
    metrics = json.loads((step / "artifact.json").read_text())["metrics"]
    assert metrics == {
        "captions": 10332, "kept": len(pool), "phrases": len(captions_of),
        "phrases_kept": len(kept),
    }  # fmt: skip
    assert 0 < len(pool) < 10332
    report = (tmp_path / "run" / "report.html").read_text()
    assert "built-in light chunker" in report
    assert "Noun phrases before and after" in report


@pytest.mark.parametrize(
    "content",
    [
        '{"caption": "a red bus", "id": "1"}\n',
        '\n{"caption": "a red bus", "id": "1"}\n',
        "a red bus\thttp://x\n",
        '[{"id": "1", "conversations": [{"from": "gpt", "value": "a red bus"}]}]',
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_mark_in_front_is_no_part_of_a_caption(tmp_path: Path, content: str, mark: str) -> None:
    (tmp_path / "captions").write_text(mark + content, encoding="utf-8")
    assert [row.caption for row in read_captions(tmp_path / "captions")] == ["a red bus"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"caption": "half \\ud83d"}\n', "captions:1: the caption has half a character"),
        ('[{"conversations": [{"from": "gpt", "value": 5}]}]', "sample 1 has no answer"),
        ('[{"conversations": [{"from": "gpt", "value": "\\ud83d"}]}]', "has half a character"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "is not a list of objects"),
    ],
)
def test_captions_that_cannot_be_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "captions").write_text(content)
    with pytest.raises(DataError, match=sentence):
        list(read_captions(tmp_path / "captions"))


def test_a_seed_changes_the_draw_and_nothing_else_does(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first = run(folders[0], REAL, seed=1)
    again = run(folders[1], REAL, seed=1)
    other = run(folders[2], REAL, seed=2)
    texts = [(step / "kept.jsonl").read_text() for step in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_choosing_by_hand() -> None:
    # phrase 1 in captions 0..4, phrase 2 in 0 and 9, phrase 3 in 5..8
    phrase = np.array([1, 2, 1, 1, 1, 1, 3, 3, 3, 3, 2], np.uint64)
    caption = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32)
    choice = choose(Postings(phrase, caption, 11), minimum=3, most=4, seed=0)
    assert choice.before_P.tolist() == [5, 2, 4]
    assert choice.chosen_C[5:9].all()  # all of the phrase that is frequent enough
    assert choice.chosen_C[:5].sum() == 4  # as many as may be of the one that is too frequent
    assert not choice.chosen_C[9:].any()  # a rare phrase and no phrase
    assert choice.after_P.tolist() == [4, int(choice.chosen_C[0]), 4]


def test_nothing_to_choose_from() -> None:
    empty = Postings(np.zeros(0, np.uint64), np.zeros(0, np.int32), 3)
    assert not choose(empty, minimum=1, most=1, seed=0).chosen_C.any()


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "top", "surfboard"]),
        ("Two dogs near a parked car", ["dogs", "parked car"]),
        ("a small dining table with 3 wooden chairs", ["small dining table", "wooden chairs"]),
        ("a tree with green leaves", ["tree", "green leaves"]),
        ("The man, the man and his dog", ["man", "dog"]),
        ("a car parked on the side of a building", ["car", "side", "building"]),
        ("", []),
        ("!!! 42 ...", []),
        ("an Élan of naïve café-goers", ["élan", "naïve café-goers"]),
    ],
)
def test_what_the_light_chunker_finds(caption: str, phrases: list[str]) -> None:
    assert light_phrases(caption) == phrases


def test_a_parsers_chunks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for spaCy, which need not be installed."""

    def load(name: str, exclude: list[str]) -> Any:
        def pipe(texts: list[str]) -> Iterator[Any]:
            for text in texts:
                chunks = [SimpleNamespace(text=part) for part in text.split(" on ")]
                yield SimpleNamespace(noun_chunks=chunks)

        return SimpleNamespace(pipe=pipe)

    spacy = ModuleType("spacy")
    spacy.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    found = list(phrases_of("en_core_web_sm", ["The red cat on a mat on it on 2 mats", "a mat"]))
    assert found == [["red cat", "mat", "mats"], ["mat"]]
    assert without_determiners("those two big dogs") == "big dogs"


TOY = """\
import spacy
from spacy.language import Language

NOUNS = {"cat", "cats", "mat", "street", "it", "dog"}
ADJECTIVES = {"red", "small", "two"}


@Language.component("toy_parser")
def parse(doc):
    for token in doc:
        if token.lower_ in NOUNS:
            token.pos_ = "PRON" if token.lower_ == "it" else "NOUN"
            after = any(t.lower_ in ("on", "with") for t in doc[:token.i])
            token.dep_ = "pobj" if after else "ROOT"
    for token in doc:
        later = [t for t in doc[token.i + 1:] if t.lower_ in NOUNS]
        if token.lower_ in {"the", "a"} | ADJECTIVES and later:
            token.head, token.dep_ = later[0], "det" if token.lower_ in ("the", "a") else "amod"
            token.pos_ = "DET" if token.dep_ == "det" else "ADJ"
        elif not token.dep_:
            token.dep_, token.pos_ = "prep", "ADP"
    return doc


def load(**overrides):
    nlp = spacy.blank("en")
    nlp.add_pipe("toy_parser")
    return nlp
"""


def test_spacys_noun_chunks_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With spaCy itself and a pipeline of a few rules, since its models cannot be downloaded."""
    pytest.importorskip("spacy")
    (tmp_path / "toy_model").mkdir()
    (tmp_path / "toy_model" / "__init__.py").write_text(TOY)
    facts = tmp_path / "toy_model-1.0.dist-info"  # by which spaCy tells a model from a folder
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = ["The red cat on a small mat with it", "a dog", "", "Two cats on the street"]
    found = list(phrases_of("toy_model", texts))
    assert found == [["red cat", "small mat"], ["dog"], [], ["cats", "street"]]
    # and through the step, whose workers are other processes
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"caption": text}) + "\n" for text in texts * 3))
    step = run(tmp_path, captions, 'chunker = "toy_model"')
    lines = (step / "phrases.tsv").read_text().splitlines()[1:]
    assert sorted(lines) == [
        f"{phrase}\t3\t3" for phrase in ("cats", "dog", "red cat", "small mat", "street")
    ]
    assert "spaCy&#39;s (toy_model)" in (tmp_path / "run" / "report.html").read_text()


def test_a_model_of_spacy_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"caption": "a cat"}\n')
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(seed=0, captions=captions, more='chunker = "en_core_web_lg"'))
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "`en_core_web_lg` is not installed" in capsys.readouterr().err
    assert without_determiners("those two big dogs") == "big dogs"


LLAVA = [
    {
        "id": str(number), "image": f"{number}.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cat on a mat"},
        ],
    }
    for number in range(5)
]  # fmt: skip


def test_llavas_json_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(LLAVA))
    step = run(tmp_path, path)
    assert json.loads((step / "captions.json").read_text()) == LLAVA


def test_rows_with_an_image_become_samples(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    rows = [{"id": n, "image": f"{n}.jpg", "caption": "a cat on a mat"} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    step = run(tmp_path, path)
    samples = json.loads((step / "captions.json").read_text())
    assert [sample["id"] for sample in samples] == ["0", "1", "2", "3"]
    for sample in samples:
        question, answer = sample["conversations"]
        assert question["value"].startswith("<image>\n")
        assert answer == {"from": "gpt", "value": "a cat on a mat"}


def test_cc3ms_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("a cat on a mat\thttp://x/1\na dog\thttp://x/2\n")
    assert [(row.caption, row.row["url"]) for row in read_captions(path)] == [
        ("a cat on a mat", "http://x/1"),
        ("a dog", "http://x/2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"caption": "a"}\n{"text": "b"}\n', ":2 is no JSON object with a `caption`"),
        (b'{"caption": 1}\n', ":1 is no JSON object with a `caption`"),
        (b"a cat\n", ":1 has no tab"),
        (b'[{"id": 1}]', "sample 1 has no answer"),
        (b'[{"id": 1}', "sample 1 has no answer|not valid JSON"),
        (b'{"caption": "\xff"}\n', "not UTF-8"),
        (b"", "holds no captions"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "captions"
    path.write_bytes(content)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(seed=0, captions=path, more=""))
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
