"""`llava-run score`: published figures from published files, and what it says of broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field
from tests.conftest import Command
from tests.plugins.evaluation.conftest import PROBLEMS

from llavakit import Benchmark, InputPath, Options, Question, Registry, Score, hookimpl
from llavakit.contracts.sections import Table
from llavakit_plugins.commands.scoring import score_command
from llavakit_plugins.evaluation.file_scores import FileScore, FileScorer


def scored(run: Command, *arguments: object) -> Mapping[str, Any]:
    code, out, err = run("score", *arguments, "--json")
    assert code == 0, err
    data: Mapping[str, Any] = json.loads(out)
    return data


# -- published files -------------------------------------------------------------------------------


def test_gpt3s_outputs_give_the_stored_predictions_row_by_row(
    shared: Path, llava_run: Command
) -> None:
    science = shared / "scienceqa"
    files = [
        "--problems",
        science / "problems.json",
        "--predictions",
        science / "gpt3_outputs.json",
    ]
    data = scored(llava_run, "scienceqa", *files)
    published = json.loads((science / "gpt3_outputs.json").read_text())
    silent = [name for name, text in published["outputs"].items() if not text]
    assert len(silent) == 17
    assert data["unparsable"] == silent
    for name, predicted in published["predicted"].items():
        assert data["results"][name] == (-1 if name in silent else predicted)
    problems = json.loads((science / "problems.json").read_text())
    right = [name for name, row in problems.items() if row["answer"] == data["results"][name]]
    assert (data["correct"], data["count"]) == (len(right), 180)
    assert data["accuracy"] == len(right) / 180
    assert data["stored"]["accuracy"] == pytest.approx(published["accuracy"])
    assert data["stored"]["differ"] == []
    images = [name for name, row in problems.items() if row["image"]]
    column = data["columns"]["IMG"]
    assert column["count"] == len(images) == 88
    assert column["percent"] == 100 * len(set(images) & set(right)) / len(images)


@pytest.mark.parametrize(("name", "stored"), [("alpaca-13b", 120.8), ("bard", 98.7)])
def test_published_reviews_give_the_published_scores(
    shared: Path, llava_run: Command, name: str, stored: float
) -> None:
    file = shared / "judge_reviews" / f"{name}_vs_vicuna-13b.jsonl"
    data = scored(llava_run, "reviews", file)
    assert round(data["stored"]["relative"], 1) == round(data["relative"], 1) == stored
    assert data["reviews"] == 80
    assert data["text"]["unparsed"] == ["68", "69", "70"]
    assert data["text"]["questions"] == 77
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [row["score"] for row in rows if row["question_id"] not in (68, 69, 70)]
    expected = 100 * sum(b for _, b in kept) / sum(a for a, _ in kept)
    assert data["text"]["relative"] == pytest.approx(expected)
    assert data["text"]["low"] < expected < data["text"]["high"]
    assert data["stored"]["disagree"] == []
    code, out, err = llava_run("score", "reviews", file)
    assert code == 0
    assert str(stored) in out
    assert "3 of 80 reviews have no two scores as text (`68`, `69`, `70`)" in err


# -- ScienceQA -------------------------------------------------------------------------------------

RIGHT = dict.fromkeys(("7", "12", "13"), "The answer is B.") | {"9": "The answer is A."}


@pytest.fixture
def problems(science: Path) -> Path:
    rows = {name: {**row, "split": "test"} for name, row in PROBLEMS.items()}
    (science / "problems.json").write_text(json.dumps(rows))
    return science / "problems.json"


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes answers by id in the format of LLaVA's answer files."""

    def write(name: str, texts: Mapping[str, str], *more: str) -> Path:
        lines = [json.dumps({"question_id": key, "text": text}) for key, text in texts.items()]
        path = tmp_path / name
        path.write_text("\n".join([*lines, *more]) + "\n")
        return path

    return write


def test_every_format_of_predictions_is_read(
    problems: Path, tmp_path: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    lines = answers("a.jsonl", RIGHT)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    files = {
        "list.json": rows[::-1],  # joined by id, not by line
        "outputs.json": {"outputs": RIGHT},
        "map.json": RIGHT,
        "results.json": {"acc": 100.0, "outputs": RIGHT, "results": dict.fromkeys(RIGHT, 1)},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content, indent=1))
    for path in (lines, *(tmp_path / name for name in files)):
        data = scored(llava_run, "scienceqa", "--problems", problems, "--predictions", path)
        assert data["correct"] == 4, path
        assert [c["count"] for c in data["columns"].values()] == [2, 1, 1, 2, 2, 1, 2, 2, 4]


def test_what_states_no_choice_or_is_missing_is_wrong_and_named(
    problems: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    texts = {"7": "a solid", "9": "The answer is E.", "13": "B", "99": "A"}
    path = answers("a.jsonl", texts)
    data = scored(llava_run, "scienceqa", "--problems", problems, "--predictions", path)
    assert data["correct"] == 1
    assert data["unparsable"] == ["7", "9", "12"]
    assert data["missing"] == ["12"]
    err = llava_run("score", "scienceqa", "--problems", problems, "--predictions", path).err
    assert "has no answer to `12`: counted as wrong" in err
    assert "answers `99`, of no problem asked: left out" in err


OURS = {"7": "The answer is B.", "9": "The answer is A.", "12": "The answer is A.", "13": "?"}
SECOND = {"7": "The answer is A.", "9": "", "12": "The answer is B.", "13": "I cannot see it."}


def ensemble(run: Command, problems: Path, answers: Callable[..., Path], *more: object) -> Any:
    ours, second = answers("ours.jsonl", OURS), answers("second.jsonl", SECOND)
    files = ["--problems", problems, "--predictions", ours, "--second", second]
    return scored(run, "scienceqa", *files, *more)


def test_complement_takes_ours_where_the_second_has_none(
    problems: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    data = ensemble(llava_run, problems, answers, "--ensemble", "complement")
    assert data["results"] == {"7": 0, "9": 0, "12": 1, "13": -1}
    assert data["correct"] == 2
    parts = data["ensemble"]
    assert parts["ours"]["correct"] == 2
    assert parts["second"]["correct"] == 1
    assert parts["upper_bound"]["correct"] == 3
    assert parts["second_without_answer"] == 2
    assert data == ensemble(llava_run, problems, answers, "--ensemble", "complement")


def test_a_letter_beyond_the_choices_counts_as_an_answer_of_the_ensembles(
    problems: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    """The original draws a choice for it; it takes ours for what states no answer alone."""
    second = answers("wild.jsonl", {"7": "The answer is E.", "9": "Hard to say."})
    ours = answers("right.jsonl", {"7": "The answer is B.", "9": "The answer is A."})
    files = ["--problems", problems, "--predictions", ours, "--second", second]
    data = scored(llava_run, "scienceqa", *files, "--ensemble", "complement")
    assert data["ensemble"]["ours"]["correct"] == 2
    assert {name: data["results"][name] for name in ("7", "9")} == {"7": -1, "9": 0}
    assert data["ensemble"]["second_without_answer"] == 3
    assert data["ensemble"]["second"]["correct"] == 0
    assert data["ensemble"]["upper_bound"]["correct"] == 2
    requery = answers("requery.jsonl", {"7": "The answer is Z.", "9": "Hard to say."})
    more = ["--ensemble", "judge", "--requery", requery]
    data = scored(llava_run, "scienceqa", *files, *more)
    assert {name: data["results"][name] for name in ("7", "9")} == {"7": -1, "9": 0}
    assert data["ensemble"]["requeried"] == 1


def test_a_judge_is_heard_where_the_two_differ_only(
    problems: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    said = {"7": "Ice is solid. The answer is B.", "12": "Hard to say.", "13": "The answer is B."}
    requery = answers("requery.jsonl", said)
    more = ["--ensemble", "judge", "--requery", requery]
    data = ensemble(llava_run, problems, answers, *more)
    # 13: both state nothing, so the judge is not asked; 12: it states nothing, so ours counts
    assert data["results"] == {"7": 1, "9": 0, "12": 0, "13": -1}
    assert data["ensemble"]["differ"] == 3
    assert data["ensemble"]["requeried"] == 1
    assert data["ensemble"]["not_requeried"] == ["9", "12"]


def test_without_a_judge_that_is_said_and_ours_counts(
    problems: Path, answers: Callable[..., Path], llava_run: Command
) -> None:
    data = ensemble(llava_run, problems, answers, "--ensemble", "judge")
    assert data["correct"] == data["ensemble"]["ours"]["correct"] == 2
    files = ["--predictions", answers("o.jsonl", OURS), "--second", answers("s.jsonl", SECOND)]
    err = llava_run("score", "scienceqa", "--problems", problems, *files, "--ensemble", "judge").err
    assert "the two differ on 3 problems, and the judge has no choice for `7`, `9`, `12`" in err
    assert "state a --judge, or its answers with --requery" in err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"question_id": "7", "text": "B"}'], "`7` is there more than once"),
        (['{"question_id": "8"}'], "needs `text`"),
        (['{"text": "B"}'], "needs `question_id`"),
        (['{"question_id": "8", "text"'], r"a.jsonl:5:\d+: not valid JSON"),
        (["7"], "a.jsonl:5: a row is a JSON object, got 7"),
    ],
)
def test_a_broken_row_is_named(
    problems: Path,
    answers: Callable[..., Path],
    refused: Callable[..., str],
    lines: Sequence[str],
    said: str,
) -> None:
    import re

    path = answers("a.jsonl", RIGHT, *lines)
    assert re.search(
        said, refused("score", "scienceqa", "--problems", problems, "--predictions", path)
    )


def test_files_that_do_not_belong_together_are_refused(
    problems: Path, answers: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    ask = ("score", "scienceqa", "--problems", problems, "--predictions")
    assert "answers no problem of" in refused(*ask, answers("a.jsonl", {"99": "A"}))
    assert "none.json does not exist" in refused(*ask, tmp_path / "none.json")
    (tmp_path / "empty").write_text("")
    assert "holds no answers" in refused(*ask, tmp_path / "empty")
    (tmp_path / "twice.json").write_text('{"outputs": {"7": "A", "7": "B"}}')
    assert "`7` is there more than once" in refused(*ask, tmp_path / "twice.json")
    (tmp_path / "numbers.json").write_text('{"outputs": {"7": 3}}')
    assert "answer `7` is no text but 3" in refused(*ask, tmp_path / "numbers.json")
    (tmp_path / "deep.json").write_text('{"outputs": ' * 100_000)
    assert "deep.json is nested too deeply" in refused(*ask, tmp_path / "deep.json")
    (tmp_path / "long.jsonl").write_text('{"question_id": ' + "9" * 5000 + ', "text": "A"}\n')
    assert "long.jsonl holds a number that is too long" in refused(*ask, tmp_path / "long.jsonl")
    text = refused(*ask, answers("b.jsonl", RIGHT), "--ensemble", "judge")
    assert "an ensemble needs both `second` and `ensemble`" in text


# -- reviews ---------------------------------------------------------------------------------------


def test_reviews_by_category_are_over_questions_and_leave_out_what_does_not_parse(
    tmp_path: Path, llava_run: Command
) -> None:
    contents = [
        ("conv", "8 4\nx"),
        ("conv", "10, 10"),
        ("detail", "5 5.5"),
        ("detail", "Score: 9 9"),
    ]
    rows = [
        {"question_id": number, "category": category, "content": content}
        for number, (category, content) in enumerate(contents)
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = scored(llava_run, "reviews", path)
    categories = {name: row["relative"] for name, row in data["text"]["categories"].items()}
    assert categories == {"conv": pytest.approx(100 * 14 / 18), "detail": pytest.approx(110)}
    assert data["relative"] == pytest.approx(100 * 19.5 / 23)  # not the mean of the two
    assert data["text"]["unparsed"] == ["3"]
    assert data["scores"] == "text"


def test_a_question_reviewed_both_ways_counts_once_with_the_mean(
    tmp_path: Path, llava_run: Command
) -> None:
    rows = [
        {"question_id": 1, "content": "8 4"},
        {"question_id": 1, "content": "6 10", "swapped": True},
        {"question_id": 2, "content": "5 5"},
        {"question_id": 2, "content": "none", "swapped": True},
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = scored(llava_run, "reviews", path)
    assert data["text"]["reference"] == (8 + 10) / 2
    assert data["text"]["candidate"] == (4 + 6) / 2
    assert data["text"]["unparsed"] == ["2"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "8", "8 9 7", "8/9", "-8 9", "11 9", "nan 3", "8 9..", "1e1 3", "8 nine", "8 9/10"),
        *("8/10/10 9", "11/10 9/10", "8*9", "Score: 8 9", "٨ ٩", "8/5 9/5", "\n\nwell\n8 9"),
    ],
)
def test_scores_that_are_not_two_numbers_do_not_parse(
    tmp_path: Path, refused: Callable[..., str], content: str
) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps({"question_id": 1, "content": content}))
    assert "no review has two scores" in refused("score", "reviews", path)
    refused("score", "reviews", path, "--reading", "tolerant")


@pytest.mark.parametrize("content", ["8 9.", "8. 9", "8.,9.", " 8.0\t9 \r\nwhy"])
def test_numbers_may_end_with_a_dot_as_in_the_original(
    tmp_path: Path, llava_run: Command, content: str
) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps({"question_id": 1, "content": content}))
    text = scored(llava_run, "reviews", path)["text"]
    assert (text["reference"], text["candidate"]) == (8, 9)


@pytest.mark.parametrize(
    "content",
    [
        *(
            "\n8 9",
            " \r\n\n8, 9\nwhy",
            "**8** **9**",
            "**8 9**",
            "__8__, __9__",
            "`8 9`",
            "8/10 9/10",
        ),
        *("**8/10** **9/10**", "**8**/10, **9**/10", "\n***8.0 / 10 9 / 10***"),
    ],
)
def test_a_tolerant_reading_is_an_option(
    tmp_path: Path, llava_run: Command, refused: Callable[..., str], content: str
) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps({"question_id": 1, "content": content}))
    assert "no review has two scores" in refused("score", "reviews", path)
    text = scored(llava_run, "reviews", path, "--reading", "tolerant")["text"]
    assert (text["reference"], text["candidate"]) == (8, 9)


def test_failures_of_the_original_count_nowhere(tmp_path: Path, llava_run: Command) -> None:
    rows = [
        {"question_id": 1, "content": "8 4", "tuple": [8, 4]},
        {"question_id": 2, "content": "?", "tuple": [-1, -1]},
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = scored(llava_run, "reviews", path)
    assert data["stored"]["relative"] == 50.0
    assert data["stored"]["unparsed"] == ["2"]


@pytest.mark.parametrize(
    "stored",
    ["[1, NaN]", "[Infinity, 1]", "[1e308, 2]", "[11, 2]", '"57"', "[true, 1]", '["8", "9"]', "{}"],
)
def test_stored_scores_that_no_judge_gives_are_refused(
    tmp_path: Path, refused: Callable[..., str], stored: str
) -> None:
    path = tmp_path / "reviews.jsonl"
    good = '{"question_id": 1, "content": "8 9", "tuple": [8, 9]}\n'
    path.write_text(f'{good}{{"question_id": 2, "content": "8 9", "tuple": {stored}}}\n')
    said = refused("score", "reviews", path, "--json")
    assert said.startswith(f"{path}:2: stored scores are two numbers up to 10, got ")


def test_scores_put_in_by_hand_do_without_the_texts(tmp_path: Path, llava_run: Command) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"question_id": 1, "content": "both are fine", "tuple": [8, 4]}\n')
    data = scored(llava_run, "reviews", path)
    assert (data["relative"], data["scores"], "text" in data) == (50.0, "stored", False)
    assert "only those stored count" in llava_run("score", "reviews", path).err


def test_a_reference_of_zeros_is_named_as_that(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"question_id": 1, "content": "0 8"}\n')
    assert "the reference's scores (as text) are all 0" in refused("score", "reviews", path)


def test_scores_that_only_some_reviews_store_are_left_aside_and_that_is_said(
    tmp_path: Path, llava_run: Command
) -> None:
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"question_id": 1, "content": "8 4", "tuple": [8, 8]},
        {"question_id": 2, "content": "5 5"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = scored(llava_run, "reviews", path)
    assert (data["scores"], data["relative"]) == ("text", pytest.approx(100 * 9 / 13))
    assert f"1 of 2 reviews store no scores (`{path}:2`)" in llava_run("score", "reviews", path).err


def test_a_question_reviewed_twice_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"question_id": 4, "content": "8 9"}\n' * 2)
    assert "question `4` is reviewed more than once" in refused("score", "reviews", path)


# -- the command -----------------------------------------------------------------------------------


class WordsOptions(Options):
    file: InputPath
    most: int = Field(default=3, ge=1, description="longest answer")
    loud: bool = False


class Words(FileScorer):
    """Counts words."""

    name = "words"
    Options = WordsOptions
    positional = ("file",)

    def __init__(self, options: WordsOptions) -> None:
        self.options = options

    def score(self) -> FileScore:
        count = min(self.options.most, len(self.options.file.read_text().split()))
        table = Table(title="words", columns=["count"], rows=[[count]])
        return FileScore({"count": count, "loud": self.options.loud}, [table], ["no more"])


class Essay(Benchmark):
    """Counts words."""

    name = "essay"
    scorers: ClassVar[Sequence[type[FileScorer]]] = (Words,)

    def questions(self) -> Sequence[Question]:
        return []

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        return Score({}, [])


class Plugin:
    @hookimpl
    def llava_benchmarks(self) -> list[type[Benchmark]]:
        return [Essay]


@pytest.fixture
def registry() -> Registry:
    registry = Registry.installed()
    registry.register(Plugin(), name="essay")
    return registry


def test_a_third_partys_benchmark_has_its_own_flags(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "essay.txt"
    file.write_text("one two three four")
    assert score_command(["words", str(file), "--most", "9", "--loud", "--json"], registry) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"count": 4, "loud": True}
    assert err == "note: no more\n"
    score_command(["words", str(file), "--set", "most=2"], registry)
    assert capsys.readouterr().out == "words\ncount\n    2\n"
    score_command([], registry)
    assert "words               Counts words." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        score_command(["words", "--help"], registry)
    assert "longest answer" in capsys.readouterr().out


def test_wrong_usage_is_said(
    registry: Registry, tmp_path: Path, refused: Callable[..., str], llava_run: Command
) -> None:
    from llavakit import RecipeError

    assert llava_run("score").code == 0
    text = refused("score", "review", "x")
    assert text == "nothing called `review` can be scored; did you mean `reviews`?"
    with pytest.raises(RecipeError, match=r"--most: .*greater than or equal to 1"):
        score_command(["words", str(Path(__file__)), "--most", "0"], registry)
    with pytest.raises(SystemExit) as caught:
        score_command(["words"], registry)
    assert caught.value.code == 2


def test_two_scorers_of_one_name_are_refused(registry: Registry) -> None:
    from llavakit import PluginError

    class Other(Essay):
        """Counts letters."""

        name = "letters"
        scorers = (type("Letters", (Words,), {}),)

    class Second:
        @hookimpl
        def llava_benchmarks(self) -> list[type[Benchmark]]:
            return [Other]

    registry.register(Second(), name="second")
    with pytest.raises(PluginError, match="both score `words`"):
        score_command(["words"], registry)
