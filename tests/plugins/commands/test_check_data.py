"""`llava-run check-data`: everything that is wrong with data, at once, before any training."""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from tests import published
from tests.conftest import Command

from llavakit import DataError, Dataset, Options, Registry, Sample, Turn, Use
from llavakit.recipe.files import CONTROL
from llavakit.testing import byte_tokenizer
from llavakit_plugins.datasets.inspection import inspect_data
from llavakit_plugins.datasets.lengths import Lengths

LLAMA = published.llama()


def row(identity: object, *turns: str, image: object = None, roles: str = "") -> dict[str, Any]:
    """A row of turns by human and gpt in turn, or as `roles` has it (h, g, s, t)."""
    names = {"h": "human", "g": "gpt", "s": "system", "t": "tool"}
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
    row("tool", "be nice", "what ?", "red .", roles="thg"),
    row("late system", "what ?", "be nice", "red .", roles="hsg"),
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
SKIP = ("--set", "unusable=skip")


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
        "conversations": [
            "tool",
            "late system",
            "twice human",
            "in the answer",
            "collapsed",
            "none",
        ],
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


NAMES = st.sampled_from(["a.png", "cut.png", "thin.png", "gone.png", "../a.png", "https://a/b.png",
                         "pipe.png", "", "<image>", "\ud83d", "human", "gpt", "a\0b"])  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | NAMES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "image", "video"]), inner, max_size=3)
    ),
    max_leaves=6,
)
CHANGES = st.dictionaries(
    st.sampled_from(["id", "image", "images", "conversations", "video", "Image", "image_width"]),
    ANYTHING,
    max_size=2,
)
TURN_CHANGES = st.dictionaries(
    st.sampled_from(["from", "value", "image", "audio"]), ANYTHING, max_size=1
)


def outcomes_of_rows(folder: Path, examples: int) -> Counter[bool]:
    """Check random rows both ways, and return how often a training would have begun."""
    registry = Registry.installed()
    use = Use[Dataset].model_validate(
        {"use": "conversations", "path": str(folder / "r.json"), "images": str(folder)}
    )
    seen: Counter[bool] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(
        st.sampled_from(GOOD),
        st.just({}) | CHANGES,
        st.just({}) | TURN_CHANGES,
        st.just(True) | ANYTHING,
    )
    def compare(good: Any, changes: Any, turn: Any, other: Any) -> None:
        made = {**json.loads(json.dumps(good)), **changes}
        if isinstance(made["conversations"], list) and isinstance(
            (made["conversations"] or [None])[0], dict
        ):
            made["conversations"][0] |= turn
        (folder / "r.json").write_text(json.dumps([made, *([] if other is True else [other])]))
        report = inspect_data(use, registry, Lengths(), lambda *_: None)
        stops = {sort.sort for sort in report.findings if sort.stops} - {"nothing learned"}
        try:
            list(registry.build(use))
        except DataError:
            assert stops
            seen[False] += 1
        else:
            assert not stops
            seen[True] += 1

    compare()
    return seen


def test_any_row_is_judged_as_training_judges_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (3, 900)).save(folder / "thin.png")
    seen = outcomes_of_rows(folder, 250)
    assert seen[True] > 20
    assert seen[False] > 20


def header(path: Path, place: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(content)


def faulty_image(folder: Path, name: str) -> None:
    path = folder / name
    if name == "pipe.png":
        os.mkfifo(path)
    elif name == "device.png":
        path.symlink_to("/dev/zero")
    elif name == "folder.png":
        path.mkdir()
    elif name == "thin.png":
        Image.new("RGB", (60_000, 1)).save(path)
    elif name == "large.webp":
        Image.new("RGB", (30, 20)).save(path)
        header(path, 26, (16383).to_bytes(2, "little") + (11000).to_bytes(2, "little"))
    elif name == "large.jpg":
        Image.new("RGB", (30, 20)).save(path)
        header(path, path.read_bytes().index(b"\xff\xc0") + 5, b"\xea\x60\xea\x60")
    elif name == "flat.png":
        Image.new("RGB", (30, 20)).save(path)
        header(path, 16, bytes(4))
    elif name == "colours.png":
        Image.new("RGB", (30, 20)).save(path)
        header(path, 25, b"\5")


IMAGE_FAULTS = ["pipe.png", "device.png", "folder.png", "thin.png", "large.webp", "large.jpg",
                "flat.png", "colours.png"]  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_an_image_that_would_stop_a_training_stops_the_check(
    folder: Path, check: Check, name: str
) -> None:
    faulty_image(folder, name)
    code, report, _ = check([*GOOD, row("bad", "<image>", "red .", image=name)])
    assert (code, report["broken_images"], len(report["findings"])) == (2, 1, 1)
    assert f"{name} of sample `bad`" in report["findings"][0]["messages"][0]
    use = {"use": "conversations", "path": str(folder / "rows.json"), "images": str(folder)}
    with pytest.raises(DataError, match=f"{name} of sample `bad`"):
        Registry.installed().build(Use[Dataset].model_validate(use))
    data = Registry.installed().build(Use[Dataset].model_validate({**use, "unusable": "skip"}))
    assert [sample.id for sample in data] == [str(good["id"]) for good in GOOD]
    code, report, err = check([*GOOD, row("bad", "<image>", "red .", image=name)], *SKIP)
    assert (code, report["usable"], report["samples"], report["rows"]) == (0, True, 6, 7), err
    assert [finding["stops"] for finding in report["findings"]] == [False]


@pytest.mark.parametrize(
    ("change", "sort", "sentence"),
    [
        ({"audio": "a.mp3"}, "unread media", "`audio` is not read"),
        ({"video_path": "a.mp4"}, "unread media", "`video_path` is not read"),
        ({"Audio": "a.wav"}, "unread media", "`Audio` is not read"),
        ({"audio_path": "a.wav"}, "unread media", "`audio_path` is not read"),
        ({"frames": ["a.png"]}, "unread media", "`frames` is not read"),
        ({"image": None, "img": "a.png"}, "unread media", "`img` is not read"),
        ({"image": None, "Image": "a.png"}, "unread media", "`Image` is not read"),
        ({"image": None, "image_path": "a.png"}, "unread media", "`image_path` is not read"),
        ({"images": ["a.png"]}, "image paths", "has `image` and `images`; keep one"),
        ({"image": None, "images": ["a.png", "b.png"]}, "conversations", "has 2 images for 1"),
        ({"image": ""}, "image paths", "`image` is an empty text"),
        ({"image": ["a.png", ""]}, "image paths", "`image` is an empty text"),
        ({"image": "https://a.org/b.png"}, "missing images", "it is an address"),
        (
            {"conversations": [{"from": "human", "value": "<image>", "video": "a.mp4"},
                               {"from": "gpt", "value": "x"}]},
            "unread media",
            "`video` is not read",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"},
                               {"from": "gpt", "value": "half \udc00"}]},
            "conversations",
            "turn 2 has half a character",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image> \ud83d"},
                               {"from": "gpt", "value": "x"}]},
            "conversations",
            "turn 1 has half a character",
        ),
    ],
)  # fmt: skip
def test_a_row_that_would_be_trained_as_something_else_is_one_error(
    folder: Path, check: Check, change: dict[str, Any], sort: str, sentence: str
) -> None:
    bad = {**row("bad", "<image>\nwhat ?", "red .", image="a.png"), **change}
    code, report, _ = check([*GOOD, bad])
    assert code == 2
    assert [finding["sort"] for finding in report["findings"]] == [sort]
    assert report["findings"][0]["count"] == 1
    assert sentence in report["findings"][0]["messages"][0]
    assert "sample `bad`" in report["findings"][0]["messages"][0]
    use = {"use": "conversations", "path": str(folder / "rows.json"), "images": str(folder)}
    with pytest.raises(DataError, match="bad"):
        Registry.installed().build(Use[Dataset].model_validate(use))
    data = Registry.installed().build(Use[Dataset].model_validate({**use, "unusable": "skip"}))
    assert [sample.id for sample in data] == [str(good["id"]) for good in GOOD]
    code, report, err = check([*GOOD, bad], *SKIP)
    assert (code, report["usable"], report["samples"], report["rows"]) == (0, True, 6, 7), err
    assert [(finding["sort"], finding["stops"]) for finding in report["findings"]] == [
        (sort, False)
    ]
    assert check([bad], *SKIP)[0] == 2  # nothing is left to train on


def test_a_list_of_images_may_be_called_images(check: Check, folder: Path) -> None:
    code, report, _ = check([{**row("two", "<image> <image>", "x"), "images": ["a.png", "b.png"]}])
    assert (code, report["multi_image_samples"], report["findings"]) == (0, 1, [])


def test_other_keys_about_media_are_reported_and_hinder_nothing(check: Check) -> None:
    known = {"image_width": 640, "model": "gpt-4", "video": None, "audio": ""}
    more = {"image_source": "coco", "video_id": "v_12"}
    lost = row("lost", "<audio>\nwhat ?", "red .")
    html = row("html", "what does the tag <video> do ?", "it shows one .")
    code, report, _ = check([{**GOOD[0], **known}, {**GOOD[1], **more}, lost, html])
    assert code == 0
    (finding,) = report["findings"]
    assert (finding["sort"], finding["count"], finding["stops"]) == ("media keys", 3, False)
    assert "`<audio>` is a word" in finding["messages"][2]
    assert "`image_source` is not read" in finding["messages"][0]


@pytest.mark.parametrize(
    "double",
    [
        '{"id": "bad", "image": "b.png", "image": "a.png", "conversations": CONV}',
        '{"id": "bad", "image": "a.png", "conversations": [], "conversations": CONV}',
        '{"id": "bad", "image": "a.png", "conversations": '
        '[{"from": "human", "value": "<image>", "value": "<image> ?"},'
        ' {"from": "gpt", "value": "x"}]}',
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_key_that_is_there_twice_is_refused_and_can_be_skipped(
    folder: Path, llava_run: Command, double: str, lines: bool
) -> None:
    double = double.replace("CONV", json.dumps(GOOD[0]["conversations"]))
    rows = [*map(json.dumps, GOOD), double]
    path = folder / ("rows.jsonl" if lines else "own.json")
    path.write_text("\n".join(rows) if lines else f"[{','.join(rows)}]")
    code, out, _ = llava_run("check-data", path, "--images", folder, "--json")
    assert code == 2
    (finding,) = json.loads(out)["findings"]
    assert (finding["sort"], finding["count"]) == ("doubled keys", 1)
    use = {"use": "conversations", "path": str(path), "images": str(folder)}
    with pytest.raises(DataError, match=r"sample `bad` of .* is there more than once"):
        Registry.installed().build(Use[Dataset].model_validate(use))
    data = Registry.installed().build(Use[Dataset].model_validate({**use, "unusable": "skip"}))
    assert len(data) == len(GOOD)


def test_thorough_decodes_every_image(folder: Path, check: Check) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    data = (folder / "a.png").read_bytes()
    header(folder / "a.png", len(data) // 2, bytes([data[len(data) // 2] ^ 255]))
    assert check(GOOD)[0] == 0
    code, report, _ = check(GOOD, "--thorough")
    assert (code, report["broken_images"]) == (2, 1)
    assert "a.png of sample `prefix` cannot be decoded" in report["findings"][0]["messages"][0]


def test_a_very_long_value_is_cut_in_messages(check: Check) -> None:
    long = "x" * 100_000
    rows = [row(long, "what ?", "w", roles="gh"), row("b", "<image>", "r", image=long),
            row("c", "<image>", "r", image=f"/{long}"), {**row("d", "hi"), long: 1},
            row("e", "<image>", "r", image=f"data:image/png;base64,{long}")]  # fmt: skip
    _, report, _ = check(rows)
    assert max(len(m) for sort in report["findings"] for m in sort["messages"]) < 3000


# -- data sets of others ---------------------------------------------------------------------------


class NoOptions(Options):
    pass


class Inline(Dataset):
    """Samples with images that were never files, one of them cut short, one sample broken."""

    name = "inline"
    Options = NoOptions
    spoilt = True

    def __init__(self, options: NoOptions) -> None:
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "png")
        self.data = base64.b64encode(buffer.getvalue())

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        if index >= 3:
            raise IndexError(index)
        if index == 1 and self.spoilt:
            raise DataError("row 2 of the table cannot be read")
        data = base64.b64decode(self.data)
        image = Image.open(io.BytesIO(data[:-900] if index == 2 and self.spoilt else data))
        turns = (Turn("human", "<image>\nwhat ?"), Turn("gpt", "red ."))
        return Sample(f"s{index}", turns, (image,))


def test_a_data_set_without_a_path_is_checked(
    llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Registry.get

    def get(self: Registry, kind: Any, name: str) -> Any:
        return Inline if name == "inline" else original(self, kind, name)

    monkeypatch.setattr(Registry, "get", get)
    code, out, err = llava_run("check-data", "--dataset", "inline", "--json")
    report = json.loads(out)
    assert (code, report["data"], report["rows"], report["samples"]) == (2, "inline", 3, 2)
    said = {sort["sort"]: sort["messages"][0] for sort in report["findings"]}
    assert said["samples"] == "row 2 of the table cannot be read"
    assert "the image of sample `s2`" in said["broken images"]
    assert "inline would stop a training" in err
    monkeypatch.setattr(Inline, "spoilt", False)
    assert llava_run("check-data", "--dataset", "inline", "--json").code == 0


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
    supervised = report["learned_tokens"]["total"]
    answers = 2 * (len("red .") + 1) + (300 - (text - len("red .") - 1))
    assert answers <= supervised <= answers + 3  # the space in front of an answer may count
    code, report, _ = check(rows, *more, "--template", "plain")
    assert "prompt template" in {sort["sort"] for sort in report["findings"]}


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
        (["rows.json", "--dataset", "scienceqa"], "data set `scienceqa` has no option `path`"),
        (["--dataset", "mix", "--images", "."], "data set `mix` has no option `images`"),
        (["--dataset", "scienceqa"], "missing option `problems` of `scienceqa`"),
        ([], "missing option `path` of `conversations`"),
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


def test_of_a_mix_every_fault_of_every_part_is_found(folder: Path, llava_run: Command) -> None:
    """A part that leaves its faults out hides none of another's; one that is no JSON, neither."""
    for name, content in (("good", GOOD), ("bad", [*GOOD, *BAD[:-1]]), ("twice", BAD)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "torn.json").write_text("[{")
    common = f'use = "conversations", images = "{folder}"'
    parts = [
        f'{{ {common}, path = "{folder}/{name}.json"{more} }}'
        for name, more in (
            ("bad", ', unusable = "skip"'), ("good", ""), ("torn", ""), ("bad", ""), ("twice", "")
        )
    ]  # fmt: skip
    inner = f'{{ use = "mix", parts = [{", ".join(parts[2:])}] }}'
    mixed = f"parts=[{parts[0]}, {parts[1]}, {inner}]"
    alone = {}
    for name in ("bad", "twice"):
        _, out, _ = llava_run("check-data", folder / f"{name}.json", "--images", folder, "--json")
        alone[name] = {sort["sort"]: sort["count"] for sort in json.loads(out)["findings"]}
    code, out, _ = llava_run("check-data", "--dataset", "mix", "--set", mixed, "--json")
    assert code == 2
    found = {sort["sort"]: sort for sort in json.loads(out)["findings"]}
    assert found["file"]["count"] == 1
    assert "torn.json" in found["file"]["messages"][0]
    for sort in ("conversations", "missing images"):
        assert found[sort]["stops"], sort
    assert (
        found["conversations"]["count"]
        == 2 * alone["bad"]["conversations"] + alone["twice"]["conversations"]
    )
    code, out, err = llava_run(
        "check-data", "--dataset", "mix", "--set", f"parts=[{parts[0]}, {parts[1]}]", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["samples"] == 2 * len(GOOD)


def test_what_a_skipping_training_would_still_stop_at_stops_the_check(check: Check) -> None:
    silent = row("silent", "what ?", "red .")
    silent["conversations"] = silent["conversations"][:1]
    code, report, _ = check([*GOOD, silent], *SKIP, "--max-length", 2)
    assert code == 2
    assert not report["usable"]
    code, report, err = check("[{}", *SKIP)
    assert (code, report["findings"][0]["sort"], report["findings"][0]["stops"]) == (
        2,
        "file",
        True,
    )
    assert "would stop a training: file" in err


def test_no_control_character_and_no_markup_of_the_data_reaches_the_terminal(
    folder: Path, llava_run: Command
) -> None:
    bad = row("a\x1b[2J", "what ?", "red .", image="[/b]\x1b]0;x\x07.png")
    path = folder / "[red] [" / "x]\x1b[31m.json"
    path.parent.mkdir()
    path.write_text(json.dumps([*GOOD, bad]))
    code, out, err = llava_run("check-data", path, "--images", folder)
    assert code == 2
    assert not CONTROL.search(out + err)
    assert "a\\x1b[2J" in out
    assert "[red] [/x]\\x1b[31m.json" in out
