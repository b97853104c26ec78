from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest

from llavakit.engine.progress import duration, show_if_slow, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """What was written, without the control sequences."""
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.getvalue())

    @property
    def last(self) -> str:
        return re.split(r"[\r\n]+", self.shown.strip())[-1]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def plain(body: Callable[[Clock, Callable[..., None]], None]) -> list[str]:
    """Return the lines that a step writes where there is no terminal."""
    clock, stream = Clock(), io.StringIO()
    with show_progress("04-pretrain", stream, clock) as progress:
        body(clock, progress)
    return stream.getvalue().splitlines()


# -- plain lines -----------------------------------------------------------------------------------


def test_the_first_line_comes_at_once_and_the_last_always() -> None:
    stream = io.StringIO()
    with show_progress("04-pretrain", stream, Clock()) as progress:
        progress(0, 300, "loss 5.2")
        assert stream.getvalue() == "04-pretrain: 0/300  loss 5.2\n"
        progress(1, 300)
        progress(2, 300, "loss 4.8")
    assert stream.getvalue().splitlines()[1:] == ["04-pretrain: 2/300, 0 s left  loss 4.8"]


def test_lines_in_between_are_ten_seconds_apart_and_say_the_time_left() -> None:
    def body(clock: Clock, progress: Callable[..., None]) -> None:
        for done in range(241):
            progress(done, 240)
            clock.now += 0.125

    lines = plain(body)
    assert [int(re.findall(r"(\d+)/240", line)[0]) for line in lines] == [0, 80, 160, 240]
    assert [line.partition(", ")[2] for line in lines] == ["", "20 s left", "10 s left", ""]


def test_every_phase_has_a_time_left_of_its_own() -> None:
    def body(clock: Clock, progress: Callable[..., None]) -> None:
        for total, seconds in ((10, 1), (40, 5)):
            for done in range(total + 1):
                progress(done, total)
                clock.now += seconds

    lines = plain(body)
    assert lines[:3] == ["04-pretrain: 0/10", "04-pretrain: 10/10", "04-pretrain: 0/40"]
    assert lines[3] == "04-pretrain: 2/40, 3 min 10 s left"
    assert lines[-1] == "04-pretrain: 40/40"


def test_starting_over_with_the_same_total_is_another_phase() -> None:
    def body(clock: Clock, progress: Callable[..., None]) -> None:
        for _ in range(2):
            for done in range(11):
                progress(done, 10)
                clock.now += 2

    lines = plain(body)
    assert lines.count("04-pretrain: 0/10") == 2
    assert not any("-" in line.partition(": ")[2] for line in lines)


def test_many_short_phases_do_not_flood() -> None:
    def body(clock: Clock, progress: Callable[..., None]) -> None:
        for phase in range(1000):
            for done in range(3):
                progress(done, 2, f"phase {phase}")
                clock.now += 0.001

    lines = plain(body)
    assert len(lines) < 8
    assert lines[-1].endswith("phase 999")


def test_calls_after_the_end_do_not_flood() -> None:
    def body(clock: Clock, progress: Callable[..., None]) -> None:
        for _ in range(1000):
            progress(5, 5)
            clock.now += 0.001

    assert plain(body) == ["04-pretrain: 5/5"] * 2


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [(0, 0, "0"), (7, 0, "7"), (3, -1, "3"), (12, 10, "12/10"), (10, 10, "10/10")],
)
def test_odd_counts_are_shown_as_they_are(done: int, total: int, expected: str) -> None:
    assert plain(lambda _, progress: progress(done, total)) == [f"04-pretrain: {expected}"]


def test_a_step_that_says_nothing_shows_nothing() -> None:
    assert plain(lambda _, progress: None) == []


def test_a_note_stays_one_plain_line() -> None:
    lines = plain(lambda _, progress: progress(0, 1, "[red]a[/]\n\x1b[2Jb\t c\r\u2028é"))
    assert lines == ["04-pretrain: 0/1  [red]a[/] [2Jb c é"]


def test_a_stream_that_lacks_a_letter_gets_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    with show_progress("évaluer", stream, Clock()) as progress:
        progress(1, 2, "größer")
    assert raw.getvalue().startswith(b"?valuer: 1/2  gr??er")


def test_the_last_line_is_written_when_a_step_fails() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with show_progress("04-pretrain", stream, Clock()) as progress:
            progress(0, 9)
            progress(4, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert stream.getvalue().splitlines()[-1].startswith("04-pretrain: 4/9")


def test_the_default_is_the_stderr_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("04-pretrain") as progress:
        progress(0, 1)
    assert capsys.readouterr() == ("", "04-pretrain: 0/1\n")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with show_progress("04-pretrain", terminal, Clock()) as progress:
        progress(0, 1)
    assert terminal.getvalue() == "04-pretrain: 0/1\n"


# -- the bar ---------------------------------------------------------------------------------------


def test_the_bar_shows_count_time_and_note(terminal: Terminal) -> None:
    clock = Clock()
    with show_progress("04-pretrain", terminal, clock) as progress:
        for done in range(101):
            progress(done, 100, f"loss {done}")
            clock.now += 1.5
    assert re.fullmatch(r"04-pretrain ━+ 100/100 2 min 30 s loss 100 *", terminal.last)


def test_the_bar_shows_the_time_left(terminal: Terminal) -> None:
    clock = Clock()
    with show_progress("04-pretrain", terminal, clock) as progress:
        for done in range(21):
            progress(done, 100)
            clock.now += 1.0
    assert "20/100 1 min 20 s left" in terminal.last


def test_a_note_on_the_bar_is_not_markup(terminal: Terminal) -> None:
    with show_progress("[b]label[/b]", terminal) as progress:
        progress(1, 2, "[red]loss[/] [/wrong] \x1b[2J\nnext")
    assert "[red]loss[/] [/wrong] [2J next" in terminal.last
    assert terminal.last.startswith("[b]label[/b] ")


def test_a_long_note_is_cut_before_the_bar_is(terminal: Terminal) -> None:
    with show_progress("04-pretrain", terminal) as progress:
        progress(1, 2, "word " * 100)
    assert "04-pretrain" in terminal.last
    assert "1/2" in terminal.last
    assert re.search("[━╺]{20}", terminal.last)
    assert terminal.last.rstrip().endswith("…")
    assert len(terminal.last) <= 100


@pytest.mark.parametrize(("done", "total"), [(0, 0), (7, 0), (3, -1), (12, 10), (10, 10)])
def test_odd_counts_do_not_break_the_bar(terminal: Terminal, done: int, total: int) -> None:
    with show_progress("04-pretrain", terminal) as progress:
        progress(done, total)
        progress(done, total, "again")
    count = f"{done}/{total}" if total > 0 else f"{done}"
    assert re.search(rf" {count} .*again", terminal.last)


def test_another_phase_takes_the_bar_s_place(terminal: Terminal) -> None:
    with show_progress("04-pretrain", terminal) as progress:
        progress(0, 0, "loading")
        progress(10, 10)
        progress(2, 4, "second")
    assert "2/4" in terminal.last
    assert "10/10" not in terminal.last


def test_an_interrupt_leaves_the_cursor_visible(terminal: Terminal) -> None:
    def interrupt() -> None:
        with show_progress("04-pretrain", terminal) as progress:
            progress(3, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    written = terminal.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert "3/9" in terminal.last


# -- durations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (0.123, "0.12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1.0 h"),
        (16200, "4.5 h"),
        (86400 * 3, "3.0 days"),
    ],
)
def test_a_duration_reads_as_people_say_it(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_what_is_quick_is_not_shown_and_what_is_slow_is() -> None:
    clock, stream = Clock(), io.StringIO()
    with show_if_slow("checking", stream, clock) as progress:
        progress(0, 100)
        clock.now += 2
        progress(10, 100)
    assert stream.getvalue() == ""
    with show_if_slow("checking", stream, clock) as progress:
        progress(0, 100)
        clock.now += 4
        progress(20, 100, "2 missing")
        clock.now += 12
        progress(40, 100, "5 missing")
    assert stream.getvalue().splitlines() == [
        "checking: 20/100  2 missing",
        "checking: 40/100, 36 s left  5 missing",
    ]
