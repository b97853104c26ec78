"""A checkout without the published files: what reads them runs all the same, or is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tests import llama_like, published

CHOSEN = {
    "tests/plugins/evaluation/test_score_command.py": "published or gpt3",
    "tests/plugins/evaluation/test_scienceqa_data.py": "scorer_reads or columns",
    "tests/plugins/generation/test_prompted.py": "real_contexts or gpt4",
    "tests/plugins/templates/test_builtin.py": "exchanges",
}


def test_tests_run_on_data_of_our_own_and_the_last_line_says_so(tmp_path: Path) -> None:
    chosen = " or ".join(f"({Path(file).stem} and ({words}))" for file, words in CHOSEN.items())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run(
        [*command, *CHOSEN],
        cwd=Path(__file__).parents[1], env={**os.environ, published.VARIABLE: str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    *_, line, summary = run.stdout.splitlines()
    assert line.startswith(f"published files: {tmp_path.resolve()} lacks tokenizer (Llama 2")
    assert "; scienceqa, captions (CC BY-NC-SA 4.0, " in line
    assert line.endswith(f"{published.VARIABLE} names the folder of the files")
    passed, skipped = map(int, re.findall(r"(\d+) (?:passed|skipped)", summary))
    assert passed >= 9
    assert skipped >= 2  # ids with the published tokenizer, in both ways
    assert f"Tests left out: {skipped};" in line


def test_the_trained_tokenizer_is_like_llamas() -> None:
    pieces = SentencePieceProcessor(model_proto=llama_like.train())
    assert [pieces.id_to_piece(number) for number in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [pieces.id_to_piece(3 + byte) for byte in (0, 10, 255)] == ["<0x00>", "<0x0A>", "<0xFF>"]
    assert pieces.encode("USER:  1\n🐱", out_type=str) == [
        "▁US", "ER", ":", "▁▁", "1", "<0x0A>", "<0xF0>", "<0x9F>", "<0x90>", "<0xB1>",
    ]  # fmt: skip
    for piece in llama_like.PIECES:
        assert not pieces.is_unknown(pieces.piece_to_id(piece)), piece
    for text in ("", " ", "a  b ", "ｆｕｌｌ ﬁ", "é\u0301\t\u200b"):  # neither folded nor cut
        assert pieces.decode(pieces.encode(text)) == text
