"""Tar shards, as webdataset and Python's tarfile write them, and all that may be wrong in one."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.numpy import load_file
from tests.conftest import Command
from tests.plugins.datasets.shards import Members, picture, row, serving, talk, write_tar
from torch.utils.data import DataLoader

from llavakit import DataError, Dataset, Registry, Sample, Turn, Use, open_image
from llavakit.testing import DatasetContract
from llavakit_plugins.datasets.stored_files import expand_braces, find_files
from llavakit_plugins.datasets.tar_shards import read_groups
from llavakit_plugins.datasets.webdataset import WebDataset


@pytest.fixture(autouse=True)
def _index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(path: object, **options: Any) -> Dataset:
    stated = [str(one) for one in path] if isinstance(path, list) else str(path)
    use = {"use": "webdataset", "path": stated, **options}
    return Registry.installed().build(Use[Dataset].model_validate(use))


def shown(sample: Sample) -> list[bytes]:
    return [image.read_bytes() for image in sample.images]  # type: ignore[union-attr]


FIRST: Members = [
    ("0001.png", picture(1)),
    ("0001.json", row(id="a", image="coco/1.png", conversations=talk("<image>\nwhat ?", "red ."))),
    ("0002.json", row(conversations=talk("hi", "hello"))),
    ("0003.jpg", picture(3, "JPEG")),
    ("0003.txt", "a caf\u00e9 .\n".encode()),
]
SECOND: Members = [
    ("__index__.json", b"{}"),
    ("0001.0.png", picture(4)),
    ("0001.1.webp", picture(5, "WEBP")),
    ("0001.json", row(messages=[
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"},
                                     {"type": "text", "text": "which ?"}]},
        {"role": "assistant", "content": "both ."}])),
    ("0001.cls", b"3"),
    (".hidden", b""), ("README", b""), ("LICENSE.md", b""),
]  # fmt: skip
ASKED = Turn("human", "<image>\nDescribe the image briefly.")
EXPECTED = [
    Sample("a", (Turn("human", "<image>\nwhat ?"), Turn("gpt", "red .")), (picture(1),)),
    Sample("s-00.tar/0002", (Turn("human", "hi"), Turn("gpt", "hello"))),
    Sample("s-00.tar/0003", (ASKED, Turn("gpt", "a caf\u00e9 .")), (picture(3, "JPEG"),)),
    Sample("s-01.tar/0001",
           (Turn("human", "<image>\n<image>\nwhich ?"), Turn("gpt", "both .")),
           (picture(4), picture(5, "WEBP")), "", "be brief"),
]  # fmt: skip


def write_both(folder: Path) -> str:
    write_tar(folder / "s-00.tar", FIRST)
    write_tar(folder / "s-01.tar", SECOND)
    return str(folder / "s-{00..01}.tar")


def plain(sample: Sample) -> Sample:
    """The sample with the bytes of its images, as they lie in the shards."""
    return Sample(sample.id, sample.turns, tuple(shown(sample)), sample.kind, sample.system)


class TestWebDataset(DatasetContract):
    @pytest.fixture(autouse=True)
    def _write(self, tmp_path: Path) -> None:
        self.path = write_both(tmp_path)

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"path": self.path}

    def build(self) -> Dataset:
        return build(self.path)

    def expected(self) -> Sequence[Sample]:
        return EXPECTED


def test_bytes_are_those_that_were_put_in(tmp_path: Path) -> None:
    data = build(write_both(tmp_path))
    assert list(map(plain, data)) == EXPECTED
    assert data.notes() == []
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert list(map(plain, copy)) == EXPECTED
    assert str(data[0].images[0]) == f"{tmp_path}/s-00.tar/0001.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, format: int) -> None:
    """With long names and folders; what comes out is compared with what tarfile extracts."""
    deep = "./" + "/".join(["folder" * 5] * (4 if format == tarfile.USTAR_FORMAT else 40))
    members = [
        (f"{deep}/00{n}.{kind}", content)
        for n in range(3)
        for kind, content in (("PNG", picture(n)), ("txt", b"a " + b"b " * n))
    ]
    path = write_tar(tmp_path / "a.tar", members, format)
    samples = list(build(path))
    with tarfile.open(path) as archive:
        files = [archive.extractfile(name) for name in archive.getnames()]
        contents = [file.read() for file in files if file is not None]
    assert [shown(sample)[0] for sample in samples] == contents[::2]
    assert [s.turns[1].text for s in samples] == [c.decode().strip() for c in contents[1::2]]
    assert samples[2].id == f"a.tar/{deep[2:]}/002"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes no file
def test_the_package_itself_writes_and_reads_the_same(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    path = str(tmp_path / "wds-000000.tar")
    with webdataset.TarWriter(path) as sink:
        for n in range(5):
            talked = {"conversations": talk("<image>\nwhat ?", f"it is {n} .")}
            sink.write({"__key__": f"part/{n:05}", "png": picture(n), "json": talked})
            sink.write({"__key__": f"text/{n:05}", "jpg": picture(n, "JPEG"), "txt": f"no {n}"})
    data = build(path)
    theirs = list(webdataset.WebDataset(path, shardshuffle=False))
    assert len(data) == len(theirs) == 10
    for sample, item in zip(data, theirs, strict=True):
        assert sample.id == f"wds-000000.tar/{item['__key__']}"
        assert shown(sample) == [item.get("png") or item["jpg"]]
        said = item.get("txt") or json.loads(item["json"])["conversations"][1]["value"].encode()
        assert sample.turns[1].text == said.decode()
    ours = write_tar(tmp_path / "ours.tar", FIRST)
    assert [item["__key__"] for item in webdataset.WebDataset(str(ours), shardshuffle=False)] == [
        "0001", "0002", "0003",
    ]  # fmt: skip


def test_captions_as_img2dataset_leaves_them(tmp_path: Path) -> None:
    """JSON beside a caption is about the download; without `txt` its `caption` is taken."""
    about = {"caption": "in json", "url": "https://x/y.jpg", "status": "success", "key": "1"}
    path = write_tar(
        tmp_path / "00000.tar",
        [("1.jpg", picture(1, "JPEG")), ("1.json", row(**about)), ("1.txt", b"in txt"),
         ("2.jpg", picture(2, "JPEG")), ("2.json", row(**about))],
    )  # fmt: skip
    questions = ["what ?", "which ?", "who ?"]
    data = build(path, questions=questions, kind="captions")
    assert [sample.turns[1].text for sample in data] == ["in txt", "in json"]
    asked = [sample.turns[0].text for sample in data]
    assert {text.removeprefix("<image>\n") for text in asked} <= set(questions)
    assert asked == [sample.turns[0].text for sample in build(path, questions=questions)]
    assert data[0].kind == "captions"


@pytest.mark.parametrize("names", [
    ["1.png", "0.png"], ["7.1.png", "7.0.png"], ["d/7.1.png", "d/7.0.png"], ["x/p.jpg", "x/q.jpg"],
])  # fmt: skip
def test_a_row_may_name_its_images_or_have_them_in_order(tmp_path: Path, names: list[str]) -> None:
    asked = talk("<image> <image> ?", "so .")
    members = [("d/7.1.png", picture(1)), ("d/7.0.png", picture(0)),
               ("d/7.json", row(image=names, conversations=asked))]  # fmt: skip
    (sample,) = build(write_tar(tmp_path / "a.tar", members))
    assert shown(sample) == [picture(1), picture(0)]
    if names[0] == "1.png":
        members[2] = ("d/7.json", row(image=names[::-1], conversations=asked))
        (sample,) = build(write_tar(tmp_path / "b.tar", members))
        assert shown(sample) == [picture(0), picture(1)]


def test_parts_of_messages_name_members(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": name} for name in ("b.png", "a.png")]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "which ?"}]}
    said = {"role": "assistant", "content": "both ."}
    members = [("7.a.png", picture(0)), ("7.b.png", picture(1)), ("7.c.png", picture(2)),
               ("7.json", row(messages=[asked, said]))]  # fmt: skip
    (sample,) = build(write_tar(tmp_path / "a.tar", members))
    assert shown(sample) == [picture(1), picture(0)]


def test_preferences_name_members(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    answers = {"chosen": "red .", "rejected": "blue ."}
    members = [
        ("1.png", picture(0)), ("1.txt", b"no caption"),
        ("1.json", row(prompt="what ?", **answers)),
        ("2.png", picture(1)),
        ("2.json", row(prompt=[{"role": "user", "content": parts}], images=["x.png"], **answers)),
        ("3.png", picture(2)),
        ("3.json", row(conversations=talk("<image>\nwhat ?", "-")[:1], **answers)),
    ]  # fmt: skip
    found = list(build(write_tar(tmp_path / "a.tar", members)))
    assert [shown(sample) for sample in found] == [[picture(number)] for number in range(3)]
    for sample in found:
        assert [turn.text for turn in sample.turns] == ["<image>\nwhat ?", "red ."]
        assert sample.rejected == "blue ."


# -- samples that cannot be used -------------------------------------------------------------------

GOOD: Members = [("good.png", picture(7)), ("good.txt", b"good .")]


def special(type: bytes, name: str = "bad.png") -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = type, "../../etc/passwd"
        archive.addfile(member)

    return add


def members(*given: tuple[str, bytes]) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        for name, content in given:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    return add


CAPTION = ("bad.txt", b"bad .")
PNG = ("bad.png", picture(8))
ASK = talk("<image>\nwhat ?", "red .")
FAULTS: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "symbolic link": (special(tarfile.SYMTYPE), "member `bad.png` is a symbolic link"),
    "hard link": (special(tarfile.LNKTYPE), "member `bad.png` is a hard link"),
    "device": (special(tarfile.CHRTYPE), "member `bad.png` is a device"),
    "pipe": (special(tarfile.FIFOTYPE), "member `bad.png` is a pipe"),
    "up": (members(("../bad.png", picture(8)), ("../bad.txt", b"x")), "`../bad.png` leaves the"),
    "absolute": (members(("/bad.png", picture(8)), ("/bad.txt", b"x")), "`/bad.png` leaves the"),
    "twice": (members(PNG, CAPTION, PNG), "member `bad.png` is there twice"),
    "apart": (members(("other.cls", b"1"), ("good.json", b"{}")), "key `good` is there again, ap"),
    "no text": (members(PNG),
                "`bad` of .* has an image or a video, but neither `json` nor `txt`"),
    "no image": (members(CAPTION), "sample `a.tar/bad` of .* has no images beside its caption"),
    "no image for a row": (members(("bad.json", row(image="bad.png", conversations=ASK))),
                           "sample `a.tar/bad` of .* shows `bad.png`, and has no image beside it"),
    "no image for a mark": (members(("bad.json", row(conversations=ASK))),
                            "sample `a.tar/bad` of .* has 0 images for 1"),
    "two images for one": (members(PNG, ("bad.b.png", picture(9)), CAPTION), "has 2 images beside"),
    "another name": (members(PNG, ("bad.b.png", picture(9)),
                             ("bad.json", row(image="c.png", conversations=ASK))),
                     "shows `c.png`, and its images are bad.png, bad.b.png"),
    "broken image": (members(("bad.png", picture(8)[:-30]), CAPTION),
                     "a.tar/bad.png of sample `a.tar/bad` cannot be decoded"),
    "no image at all": (members(("bad.png", b"<html>"), CAPTION), "a.tar/bad.png of sample"),
    "empty caption": (members(PNG, ("bad.txt", b" \n")), "`a.tar/bad` of .* its caption is empty"),
    "latin-1": (members(PNG, ("bad.txt", b"caf\xe9")), "a.tar/bad.txt is not UTF-8 text"),
    "no JSON": (members(PNG, ("bad.json", b'{"a": ')), "a.tar/bad.json:1:7: not valid JSON"),
    "doubled key": (members(PNG, ("bad.json", b'{"a": 1, "a": 2}')), "bad.json.*more than once"),
    "a list": (members(PNG, ("bad.json", b"[]")), "a.tar/bad.json is no JSON object"),
    "deep": (members(PNG, ("bad.json", b"[" * 100_000)), "nested too deeply"),
    "no talk": (members(PNG, ("bad.json", row(width=3, url="x"))), "has none of `conversations`"),
    "two questions": (members(("bad.json", row(conversations=[*talk("a", "b")[:1]] * 2))),
                      "sample `a.tar/bad` of .*turn 2 is from `human`"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_that_cannot_be_used_is_named_or_left_out(
    tmp_path: Path, fault: str, llava_run: Command
) -> None:
    add, said = FAULTS[fault]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        members(*GOOD)(archive)
        add(archive)
        members(("last.png", picture(9)), ("last.txt", b"last ."))(archive)
    with pytest.raises(DataError, match=said) as error:
        build(path)
    assert str(path) in str(error.value)
    assert 'set unusable = "skip"' in str(error.value)
    data = build(path, unusable="skip")
    assert [shown(sample) for sample in data] == [[picture(7)], [picture(9)]]
    (note,) = data.notes()
    assert "1 of 3 samples are left out" in note
    code, out, _ = llava_run("check-data", path, "--json")
    report = json.loads(out)
    assert (code, report["rows"]) == (2, 3)
    found = [message for sort in report["findings"] for message in sort["messages"]]
    assert any(str(path) in message for message in found)
    assert llava_run("check-data", path, "--set", "unusable=skip").code == 0


# -- shards that cannot be used --------------------------------------------------------------------


def many(count: int = 6) -> Members:
    return [
        member
        for n in range(count)
        for member in ((f"{n}.png", picture(n)), (f"{n}.txt", f"caption {n}".encode()))
    ]


def broken(kind: str, path: Path) -> str:
    """Break a shard; return what is to be said of it."""
    data = bytearray(path.read_bytes())
    if kind == "compressed":
        path.write_bytes(gzip.compress(data))
        return r"is compressed \(gzip\).*unpack it with `gunzip`"
    if kind == "within a member":
        path.write_bytes(data[:6000])
        return "is cut off within member `"
    if kind == "between members":
        with tarfile.open(path) as archive:
            end = archive.getmembers()[4].offset
        path.write_bytes(data[:end])
        return "ends behind member `1.txt` without the mark of a tar's end"
    if kind == "a header":
        with tarfile.open(path) as archive:
            data[archive.getmembers()[4].offset + 150] ^= 1
        path.write_bytes(data)
        return r"is damaged behind member `1.txt` \(byte \d"
    if kind == "joined":
        path.write_bytes(data * 2)
        return "goes on behind its end, as if shards were joined"
    if kind == "empty":
        path.write_bytes(b"")
        return "is no tar file"
    if kind == "other members":
        write_tar(path, [("README.md", b"x"), ("0.cls", b"1"), ("1.flac", b"2")])
        return "holds no samples"
    if kind == "zeros":
        path.write_bytes(bytes(10240))
        return "holds no samples"
    if kind == "a page":
        path.write_bytes(b"<!DOCTYPE html>" * 100)
        return "is no tar file"
    raise AssertionError(kind)


KINDS = ["compressed", "within a member", "between members", "a header", "joined", "empty",
         "zeros", "a page", "other members"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_names_itself(tmp_path: Path, kind: str, llava_run: Command) -> None:
    good, bad = tmp_path / "s-0.tar", tmp_path / "s-1.tar"
    for path in (good, bad):
        write_tar(path, many())
    said = broken(kind, bad)
    with pytest.raises(DataError, match=said) as error:
        build(tmp_path / "s-*.tar")
    assert str(bad) in str(error.value)
    data = build(tmp_path / "s-*.tar", unusable="skip")
    assert len(data) == 6
    assert str(bad) in data.notes()[0]
    code, out, _ = llava_run("check-data", tmp_path / "s-*.tar", "--json")
    assert code == 2
    sorts = {sort["sort"]: sort["messages"] for sort in json.loads(out)["findings"]}
    assert str(bad) in sorts["shards"][0]
    with pytest.raises(DataError, match=said):
        build(bad, unusable="skip")  # nothing is left


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damage_is_a_traceback_or_loses_a_sample_in_silence(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = write_tar(tmp_path / "a.tar", many(3))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1024))]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    os.utime(path, ns=(1, data.draw(st.integers(1, 1 << 60))))
    whole = False
    with contextlib.suppress(DataError):
        assert len(build(path)) == 3
        whole = True
    if not whole:
        with pytest.raises(DataError, match=r"a\.tar"):
            build(path)


def test_headers_that_claim_the_impossible(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.txt")
    claims = []
    for size in (1 << 70, -(1 << 40), 1 << 40):
        header.size = size
        claims.append(header.tobuf(tarfile.GNU_FORMAT))
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 0
    claims.append(long.tobuf(tarfile.GNU_FORMAT) * 5000)
    tracemalloc.start()
    for number, claim in enumerate(claims):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(claim + bytes(1024))
        with pytest.raises(DataError, match=f"{number}.tar"):
            build(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


# -- the index -------------------------------------------------------------------------------------


def test_a_shard_is_indexed_once_and_anew_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_both(tmp_path)
    read: list[str] = []

    def noting(shard: Any) -> Any:
        read.append(shard.name)
        return read_groups(shard)

    monkeypatch.setattr("llavakit_plugins.datasets.tar_index.read_groups", noting)
    first = build(path)
    assert read == ["s-00.tar", "s-01.tar"]
    assert list(map(plain, build(path))) == EXPECTED
    assert len(read) == 2
    write_tar(tmp_path / "s-01.tar", many(2))
    with pytest.raises(DataError, match=r"s-01.tar was changed while it was in use"):
        shown(first[3])
    assert len(build(path)) == 5
    assert read[2:] == ["s-01.tar"]
    # what is damaged of the index is made again, and half of one is never taken for the whole
    files = sorted((tmp_path / "cache" / "llavakit" / "shards").iterdir())
    assert not [file for file in files if file.suffix != ".index"]
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    assert len(build(path)) == 5
    assert sorted(read[3:]) == ["s-00.tar", "s-01.tar"]


def test_an_index_is_a_file_of_safetensors(tmp_path: Path) -> None:
    """Read by that package: the members are where it says."""
    build(write_both(tmp_path), index=str(tmp_path / "index"))
    (path,) = (tmp_path / "index").glob("all-*")
    arrays = load_file(path)
    shards = [(tmp_path / f"s-0{n}.tar").read_bytes() for n in range(2)]
    starts = arrays["images"].tolist()
    found = [shards[n][a : a + b] for n, (a, b) in zip((0, 0, 1, 1), starts, strict=True)]
    assert found == [picture(1), picture(3, "JPEG"), picture(4), picture(5, "WEBP")]
    assert arrays["shard_ends"].tolist() == [3, 4]
    texts = [
        shards[n][a : a + b]
        for n, (a, b) in zip((0, 0, 0, 1), arrays["texts"].tolist(), strict=True)
    ]
    assert texts == [FIRST[1][1], FIRST[2][1], FIRST[4][1], SECOND[3][1]]


INDEXES = """\
import sys, time
from llavakit import Registry, Use, Dataset
from llavakit_plugins.datasets import tar_index
plain, mine = tar_index.read_groups, []
def slowly(shard):
    mine.append(shard.name)
    time.sleep(0.02)
    return plain(shard)
tar_index.read_groups = slowly
use = Use[Dataset](use="webdataset", path=sys.argv[1], index=sys.argv[2])
data = Registry.installed().build(use)
print(*mine)
print(len(data), data[len(data) - 1].id)
"""


def test_processes_share_the_work_of_indexing(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"s-{number:02}.tar", many(2))
    arguments = [sys.executable, "-c", INDEXES, str(tmp_path / "s-*.tar"), str(tmp_path / "index")]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    done = [name for output in outputs for name in output[0].split()]
    assert sorted(done) == [f"s-{number:02}.tar" for number in range(40)]  # each by one of them
    assert [output[1] for output in outputs] == ["80 s-39.tar/1"] * 3


def test_a_copy_goes_to_a_machine_with_shards_of_its_own(tmp_path: Path) -> None:
    """As where each machine keeps copies on its disk, and no machine another's cache folder."""
    path = write_both(tmp_path)
    sent = pickle.dumps(build(path))
    shutil.rmtree(tmp_path / "cache")
    for shard in tmp_path.glob("*.tar"):
        os.utime(shard, (1, 1))
    copy = pickle.loads(sent)  # noqa: S301
    assert list(map(plain, copy)) == EXPECTED
    write_tar(tmp_path / "s-01.tar", many(9))
    with pytest.raises(
        DataError, match=r"s-01.tar has \d\d,\d+ bytes on one machine and 10,240 on"
    ):
        pickle.loads(sent)  # noqa: S301


def test_a_limit_reads_no_more_shards_than_it_takes(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "s-02.tar").write_bytes(b"no tar")
    assert len(build(tmp_path / "s-*.tar", limit=2)) == 2
    assert len(build(tmp_path / "s-*.tar", limit=4)) == 4
    with pytest.raises(DataError, match=r"s-02.tar is no tar file"):
        build(tmp_path / "s-*.tar", limit=5)


def test_texts_are_read_when_asked_for_and_images_when_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(write_both(tmp_path))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image is opened"))
    assert [len(sample.images) for sample in data] == [1, 0, 1, 2]


def test_a_plan_knows_what_is_there(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"s-{number:02}.tar", many(4))
    options = WebDataset.Options.model_validate
    samples, tokens = WebDataset.expect(options({"path": str(tmp_path / "s-*.tar")})) or (0, 0)
    assert samples == pytest.approx(48, abs=1)
    assert tokens > 0
    assert WebDataset.expect(options({"path": str(tmp_path / "none-*.tar")})) is None
    stated = {"path": "s3://bucket/{0..9}.tar", "expect": {"samples": 9, "tokens": 5}, "limit": 3}
    assert WebDataset.expect(options(stated)) == (3, 5)


def test_memory_stays_small(tmp_path: Path) -> None:
    caption = b"one of many captions ."
    count, one = 4000, picture(1)
    write_tar(
        tmp_path / "s.tar",
        [m for n in range(count) for m in ((f"{n}.png", one), (f"{n}.txt", caption))],
    )
    build(tmp_path / "s.tar")
    tracemalloc.start()
    data = build(tmp_path / "s.tar")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(data) == count
    assert held < 200_000  # the index is mapped: bytes a sample would show


# -- names, here and elsewhere ---------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@pytest.mark.parametrize("name", [
    "s-{000000..000012}.tar", "{a,b}-{1..3}.tar", "{8..12}.tar", "{08..12}.tar", "{3..1}.tar",
    "{0..10..5}.tar", "{10..0..5}.tar", "{x}.tar", "{}.tar", "a{,b}.tar", "{001..3}.tar",
    "{00..00}",
])  # fmt: skip
def test_braces_are_those_of_a_shell(name: str) -> None:
    bash = subprocess.run(
        ["bash", "-c", f"echo {name}"], capture_output=True, text=True, check=True
    )
    assert list(expand_braces(name)) == bash.stdout.split()


def test_names_that_stand_for_nothing_or_far_too_much(tmp_path: Path) -> None:
    write_both(tmp_path)
    with pytest.raises(DataError, match=r"2 of 4 files do not exist: .*s-02.tar, .*s-03.tar"):
        build(tmp_path / "s-{00..03}.tar")
    with pytest.raises(DataError, match=r"no file fits .*x-\*.tar"):
        build(tmp_path / "x-*.tar")
    with pytest.raises(DataError, match=r"more than 1,000,000 files"):
        build(tmp_path / "s-{0..9}{0..9999999}.tar")
    with pytest.raises(DataError, match=r"is a folder; name its files"):
        build(tmp_path)
    both = [tmp_path / "s-01.tar", f"file://{tmp_path}/s-00.tar", tmp_path / "s-*.tar"]
    assert [sample.id for sample in build(both)] == [
        "s-01.tar/0001", "a", "s-00.tar/0002", "s-00.tar/0003"
    ]  # fmt: skip


def test_shards_in_memory_of_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    write_both(tmp_path)
    system = fsspec.filesystem("memory")
    try:
        for number in range(2):
            system.pipe(f"/train/s-0{number}.tar", (tmp_path / f"s-0{number}.tar").read_bytes())
        for name in ("memory://train/s-{00..01}.tar", "memory://train/s-*.tar"):
            data = build(name)
            assert list(map(plain, data)) == EXPECTED
        assert str(data[0].images[0]) == "memory://train/s-00.tar/0001.png"
        assert open_image(data[0].images[0], "s").size == (12, 10)
        kept = {"simplecache": {"cache_storage": str(tmp_path / "copies")}}
        assert list(map(plain, build(f"simplecache::{name}", storage=kept))) == EXPECTED
        assert len(list((tmp_path / "copies").iterdir())) >= 2
        with pytest.raises(DataError, match=r"1 of 3 files do not exist: memory://train/s-02.tar"):
            build("memory://train/s-{00..02}.tar")
        with pytest.raises(DataError, match="no file fits memory://train/x"):
            build("memory://train/x*.tar")
    finally:
        system.rm("/train", recursive=True)


class Shown:
    """What images of a data set's samples hold, as a loader's workers read them."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> list[bytes]:
        return shown(self.data[index])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12
def test_shards_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    monkeypatch.setattr("llavakit_plugins.datasets.stored_files._PAUSES", (0.0, 0.0))
    write_both(tmp_path)
    with serving(tmp_path) as (address, server):
        data = build(f"{address}/s-{{00..01}}.tar")
        asked = len(server.asked)
        assert asked <= 4  # in large pieces, not a request for each member
        assert list(map(plain, data)) == EXPECTED
        assert all(given[1] is not None for given in server.asked)  # never a whole file
        assert list(map(plain, build(f"{address}/s-{{00..01}}.tar"))) == EXPECTED
        server.failing = 2
        assert shown(data[0]) == [picture(1)]
        server.failing = 9
        with pytest.raises(DataError, match=r"cannot read http://127.0.0.1.*/s-00.tar: .*503"):
            shown(data[0])
        server.failing = 0
        with pytest.raises(DataError, match=r"1 of 3 files do not exist: .*s-02.tar"):
            build(f"{address}/s-{{00..02}}.tar")
        server.knows_ranges = False
        with pytest.raises(DataError, match=r"sends whole files where a part is asked for"):
            shown(data[0])
        server.knows_ranges = True
        # workers are forked where fsspec's threads are at work already
        loader: DataLoader[Any] = DataLoader(Shown(data), batch_size=None, num_workers=2)  # type: ignore[arg-type]
        assert list(loader) == [list(sample.images) for sample in EXPECTED]
    with pytest.raises(DataError, match=r"cannot read http://"):
        build(f"{address}/s-00.tar", unusable="skip")  # a network's fault leaves nothing out


def test_what_an_address_needs_is_said() -> None:
    with pytest.raises(DataError, match=r"nowhere://bucket/a.tar: Protocol not known: nowhere"):
        build("nowhere://bucket/a.tar")
    if not _has("s3fs"):
        with pytest.raises(DataError, match=r"s3://bucket/a.tar needs a package: Install s3fs"):
            build("s3://bucket/a.tar")


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def test_threads_read_the_same_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", many(20))
    data = build(tmp_path / "a.tar")
    expected = [picture(n) for n in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: shown(data[n])[0], [*range(20)] * 20))
    assert found == expected * 20


def test_shards_and_files_in_one_mix(tmp_path: Path) -> None:
    path = write_both(tmp_path)
    rows = [{"id": f"r{n}", "conversations": talk("hi", f"no {n}")} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parts = [{"use": "webdataset", "path": path},
             {"use": "conversations", "path": str(tmp_path / "rows.json")}]  # fmt: skip
    mix = {"use": "mix", "parts": parts, "weights": [2, 0.5]}
    data = Registry.installed().build(Use[Dataset].model_validate(mix))
    ids = [sample.id for sample in data]
    assert ids[:8] == [sample.id for sample in EXPECTED] * 2
    assert len(ids) == 10
    assert set(ids[8:]) <= {"r0", "r1", "r2", "r3"}
    assert np.asarray(open_image(data[4].images[0], "s")).shape == (10, 12, 3)


def test_predict_answers_shards(model: Path, tmp_path: Path, llava_run: Command) -> None:
    path, out = write_both(tmp_path), tmp_path / "answers.jsonl"
    short = ("--device", "cpu", "--max-new-tokens", 3)
    code, _, err = llava_run("predict", model, path, out, *short)
    assert code == 0, err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [sample.id for sample in EXPECTED]
    assert answers[0]["image"] == [f"{tmp_path}/s-00.tar/0001.png"]
    assert answers[0]["truth"] == "red ."


def test_an_fsspec_that_hangs_in_forked_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec import asyn

    monkeypatch.delattr(asyn, "reset_after_fork")
    with pytest.raises(DataError, match=r"with fsspec .*; pip install --upgrade"):
        find_files(["memory://shards/a.tar"], {})
