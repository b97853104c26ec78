"""Data sets of the package `datasets`, written by that package itself: images stay as they are."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import Command, RecipeWriter
from tests.core import processes
from tests.plugins.datasets.shards import serving

from llavakit import DataError, Dataset, Registry, Sample, Turn, Use
from llavakit.testing import DatasetContract
from llavakit_plugins.datasets.huggingface import HuggingFace

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


def build(path: object, **options: Any) -> Dataset:
    use = {"use": "huggingface", "path": str(path), **options}
    return Registry.installed().build(Use[Dataset].model_validate(use))


def png(seed: int, format: str = "PNG") -> bytes:
    draw = np.random.default_rng(seed)
    buffer = io.BytesIO()
    pixels = draw.integers(0, 256, (9 + seed, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": {"bytes": png(0), "path": "0.png"},
     "conversations": turns("<image>\nwhat ?", "red .")},
    {"id": "b", "image": None, "conversations": turns("hi", "hello", "and ?", "so .")},
    {"id": "c", "image": {"bytes": png(1, "JPEG"), "path": None},
     "conversations": turns("what ?\n<image>", "blue .")},
]  # fmt: skip
EXPECTED = [
    Sample("a", (Turn("human", "<image>\nwhat ?"), Turn("gpt", "red .")), (png(0),)),
    Sample("b", (Turn("human", "hi"), Turn("gpt", "hello"),
                 Turn("human", "and ?"), Turn("gpt", "so ."))),
    Sample("c", (Turn("human", "what ?\n<image>"), Turn("gpt", "blue .")), (png(1, "JPEG"),)),
]  # fmt: skip


def table(rows: Sequence[dict[str, Any]] = ROWS, image: str = "image") -> Any:
    """A table of `datasets` whose column `image` holds images."""
    made = datasets.Dataset.from_list(list(rows))
    return made.cast_column(image, datasets.Image())


def as_parquet(folder: Path) -> Path:
    table().to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def as_arrow(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"))
    (part,) = (folder / "saved").glob("*.arrow")
    return part


def as_saved(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_saved_splits(folder: Path) -> Path:
    other = table(ROWS[:1])
    splits = datasets.DatasetDict({"train": table(), "test": other})
    splits.save_to_disk(str(folder / "splits"))
    return folder / "splits"


def as_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    table(ROWS[:2]).to_parquet(str(folder / "data" / "train-00000-of-00002.parquet"))
    table(ROWS[2:]).to_parquet(str(folder / "data" / "train-00001-of-00002.parquet"))
    return folder / "data"


FORMS = [as_parquet, as_arrow, as_saved, as_saved_splits, as_folder]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_of_a_table_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    data = build(write(tmp_path))
    assert list(data) == EXPECTED  # the images' bytes are those that were put in
    assert data.notes() == []


def test_several_files_by_braces_stars_and_addresses(
    tmp_path: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # or it reads no address at all
    data = as_folder(tmp_path)
    names = ["train-{00000..00001}-of-00002.parquet", "train-*.parquet", "*-of-00002.parquet"]
    for name in names:
        assert list(build(data / name)) == EXPECTED
    assert build(f"{data}/train-{{00001,00000}}-of-00002.parquet")[0] == EXPECTED[2]
    options = HuggingFace.Options.model_validate({"path": str(data / names[0])})
    assert (HuggingFace.expect(options) or (0, 0))[0] == 3
    with pytest.raises(DataError, match=r"1 of 3 files do not exist: .*train-00002-of"):
        build(data / "train-{00000..00002}-of-00002.parquet")
    code, out, err = llava_run("check-data", data / names[0], "--json")
    assert (code, json.loads(out)["samples"]) == (0, 3), err
    system = pytest.importorskip("fsspec").filesystem("memory")
    for file in data.iterdir():
        system.pipe(f"/rows/{file.name}", file.read_bytes())
    try:
        assert list(build(f"memory://rows/{names[0]}")) == EXPECTED
        assert list(build("memory://rows/*.parquet")) == EXPECTED
        with pytest.raises(DataError, match=r"no file fits memory://rows/x"):
            build("memory://rows/x*.parquet")
    finally:
        system.rm("/rows", recursive=True)
    with serving(data) as (address, _):
        assert list(build(f"{address}/{names[0]}")) == EXPECTED
        with pytest.raises(DataError, match=r"the file does not exist: .*none.parquet"):
            build(f"{address}/none.parquet")


class TestHuggingFace(DatasetContract):
    @pytest.fixture(autouse=True)
    def _write(self, tmp_path: Path) -> None:
        self.path = as_parquet(tmp_path)

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"path": str(self.path)}

    def build(self) -> Dataset:
        return build(self.path)

    def expected(self) -> Sequence[Sample]:
        return EXPECTED


def test_messages_with_images_of_their_own_column(tmp_path: Path) -> None:
    """As TRL and the hub's data sets for vision models have them: parts, and a list of images."""
    rows = [
        {
            "images": [{"bytes": png(n), "path": None} for n in range(2)],
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
                {"role": "user", "content": [
                    {"type": "image", "text": None}, {"type": "image", "text": None},
                    {"type": "text", "text": "which ?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "both ."}]},
            ],
        }
    ]  # fmt: skip
    made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(str(tmp_path / "rows.parquet"))
    (sample,) = build(tmp_path / "rows.parquet")
    both = (Turn("human", "<image>\n<image>\nwhich ?"), Turn("gpt", "both ."))
    assert sample == Sample("#1", both, (png(0), png(1)), "", "be brief")


def test_messages_with_images_inside_their_parts(tmp_path: Path) -> None:
    part = {"type": "image", "text": None, "image": {"bytes": png(2), "path": None}}
    text = {"type": "text", "text": "which ?", "image": None}
    answer = {"type": "text", "text": "this .", "image": None}
    rows = [{"messages": [{"role": "user", "content": [part, text]},
                          {"role": "assistant", "content": [answer]}]}]  # fmt: skip
    inside = {"type": datasets.Value("string"), "text": datasets.Value("string"),
              "image": datasets.Image()}  # fmt: skip
    message = {"role": datasets.Value("string"), "content": datasets.List(inside)}
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    (sample,) = build(tmp_path / "rows.parquet")
    both = (Turn("human", "<image>\nwhich ?"), Turn("gpt", "this ."))
    assert sample == Sample("#1", both, (png(2),))


def test_images_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(0))
    rows = [{"image": "a.png", "conversations": turns("<image>", "red .")}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    (sample,) = build(tmp_path / "rows.parquet", images=str(tmp_path / "pictures"))
    assert sample.images == (tmp_path / "pictures" / "a.png",)
    with pytest.raises(DataError, match=r"a\.png .* does not exist"):
        build(tmp_path / "rows.parquet")


def test_nothing_is_decoded_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(tmp_path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image is decoded"))
    data = build(path)
    assert [len(sample.images) for sample in data] == [1, 0, 1]
    assert [len(sample.images) for sample in pickle.loads(pickle.dumps(data))] == [1, 0, 1]  # noqa: S301


# -- what cannot be used ---------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_named_or_left_out(tmp_path: Path, llava_run: Command) -> None:
    rows = [
        *ROWS,
        {"id": "cut", "image": {"bytes": png(3)[:150], "path": None},
         "conversations": turns("<image>", "red .")},
        {"id": "unmarked", "image": {"bytes": png(4), "path": None},
         "conversations": turns("what ?", "red .")},
    ]  # fmt: skip
    table(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"sample `cut`.*or set unusable = \"skip\""):
        build(tmp_path / "rows.parquet")
    data = build(tmp_path / "rows.parquet", unusable="skip")
    assert list(data) == EXPECTED
    (note,) = data.notes()
    assert "2 of 5 samples are left out" in note
    for thorough in ((), ("--thorough",)):
        code, out, err = llava_run("check-data", tmp_path / "rows.parquet", "--json", *thorough)
        report = json.loads(out)
        assert code == 2, err
        assert (report["rows"], report["samples"], report["broken_images"]) == (5, 4, 1)
        assert report["distinct_images"] == 4
        sorts = {sort["sort"]: sort["messages"] for sort in report["findings"]}
        assert "`unmarked`" in sorts["conversations"][0]
        assert "`cut`" in sorts["broken images"][0]
    skip = ("--set", "unusable=skip")
    assert llava_run("check-data", tmp_path / "rows.parquet", *skip).code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "none.parquet"}, "none.parquet does not exist, and is no name on the hub"),
        ({"split": "tset"}, "split `tset`"),
        ({"path": "notes.txt"}, "notes.txt is none of .parquet, .arrow"),
        ({"path": "broken.parquet"}, "cannot read the data set"),
        ({"path": "other.parquet"}, "has no column `conversations` or `messages` (it has text)"),
        ({"path": "splits", "split": "dev"}, "has no split `dev`; it has train, test"),
    ],
)
def test_data_that_cannot_be_had_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    as_parquet(tmp_path)
    as_saved_splits(tmp_path)
    Path("notes.txt").write_text("x")
    Path("broken.parquet").write_bytes(b"PAR1 but not really")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet("other.parquet")
    with pytest.raises(DataError) as error:
        build(**{"path": "rows.parquet", **options})
    assert said in str(error.value)


def test_without_the_package_it_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    path = as_parquet(tmp_path)
    plain = builtins.__import__

    def without(name: str, *more: Any, **named: Any) -> Any:
        if name == "datasets":
            raise ImportError("its own needs another numpy")
        return plain(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    said = refused("check-data", path)
    assert "cannot be imported (its own needs another numpy)" in said
    assert "pip install 'llavakit[datasets]'" in said


def test_a_name_of_the_hub_is_asked_for_as_it_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava_run: Command
) -> None:
    """The hub itself is played by a function: what it is asked, and what it says when offline."""
    asked: list[Any] = []

    def hub(*given: Any, **named: Any) -> Any:
        asked.append((given, named))
        if given[0] == "lab/gone":
            raise ConnectionError("Couldn't reach 'lab/gone' on the Hub (offline)")
        return table()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = build("lab/pictures", subset="en", split="train[:3]", revision="abc", limit=2)
    assert list(data) == EXPECTED[:2]
    assert asked == [(("lab/pictures", "en"), {"split": "train[:3]", "revision": "abc"})]
    code, out, err = llava_run("check-data", "lab/pictures", "--json", "--set", "subset=de")
    assert (code, json.loads(out)["samples"]) == (0, 3), err
    assert asked[-1][0] == ("lab/pictures", "de")
    code, out, _ = llava_run("check-data", "lab/gone")
    assert code == 2
    assert "cannot read the data set lab/gone" in out
    assert "offline" in out
    # plans fetch nothing
    stated = type(data).Options.model_validate({"path": "lab/pictures"})
    count = len(asked)
    assert type(data).expect(stated) is None
    assert len(asked) == count


# -- training --------------------------------------------------------------------------------------


def test_training_is_that_of_the_same_rows_in_files_and_resumes_exactly(
    write_recipe: RecipeWriter, data: Path, tmp_path: Path
) -> None:
    rows = json.loads((data / "train.json").read_text())
    held = []
    for row in rows:
        name = row.get("image")
        shown = {"bytes": (data / "images" / name).read_bytes(), "path": name} if name else None
        held.append({**row, "image": shown})
    table(held).to_parquet(str(tmp_path / "train.parquet"))
    old = f'use = "conversations", path = "{data}/train.json", images = "{data}/images"'
    new = f'use = "huggingface", path = "{tmp_path}/train.parquet"'
    plain, inside = write_recipe(), write_recipe((old, new), name="inside.toml")
    assert processes.run(tmp_path, plain, "--out", tmp_path / "plain") == 0
    out = ("--out", tmp_path / "inside")
    assert processes.run(tmp_path, inside, *out, kill_at=13, below="02-finetune") == -signal.SIGKILL
    assert processes.run(tmp_path, inside, *out, "--resume") == 0, (
        tmp_path / "terminal.txt"
    ).read_text()
    for name in ("connector.safetensors", "language/model.safetensors"):
        expected, found = (
            load_file(tmp_path / run / "model" / name) for run in ("plain", "inside")
        )
        assert expected.keys() == found.keys()
        assert all(expected[key].equal(found[key]) for key in expected)


def test_predict_answers_a_table(
    write_recipe: RecipeWriter, tmp_path: Path, llava_run: Command
) -> None:
    from llavakit import Recipe
    from llavakit.model.folder import create_model, save_model

    registry = Registry.installed()
    model = create_model(Recipe.load(write_recipe(), registry).parts(), registry, seed=0).eval()
    save_model(model, tmp_path / "model")
    path, out = as_parquet(tmp_path), tmp_path / "answers.jsonl"
    short = ("--device", "cpu", "--max-new-tokens", 5)
    code, _, err = llava_run("predict", tmp_path / "model", path, out, *short)
    assert code == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in found] == ["a", "b", "c"]
    assert [row["truth"] for row in found] == ["red .", "so .", "blue ."]
    assert [row["image"] for row in found] == [[""], [], [""]]
    assert found[1]["history"] == [{"role": "user", "content": "hi"},
                                   {"role": "assistant", "content": "hello"}]  # fmt: skip
    asked = [model.generate(EXPECTED[0].turns[0].text, images=[png(0)], max_new_tokens=5)]
    asked.append(
        model.generate(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
             {"role": "user", "content": "and ?"}], max_new_tokens=5,
        )
    )  # fmt: skip
    assert [row["text"] for row in found[:2]] == asked
