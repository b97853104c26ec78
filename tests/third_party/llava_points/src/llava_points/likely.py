"""A benchmark that decodes nothing: the likelier of two words is the answer."""

from __future__ import annotations

from collections.abc import Sequence

from llavakit import Benchmark, Build, Dataset, Options, Question, Run, Score, Use


class LikelyOptions(Options):
    data: Use[Dataset]
    words: tuple[str, str] = ("yes", "no")


class Likely(Benchmark):
    """Asks for each sample whether it is picture 0, and compares the words' first tokens."""

    name = "likely"
    Options = LikelyOptions
    options: LikelyOptions

    def __init__(self, options: LikelyOptions, *, build: Build) -> None:
        self.options = options
        self.data = build(options.data)

    def questions(self) -> Sequence[Question]:
        return [
            Question(
                sample.id, "Is it picture 0?", sample.images, truth=self.options.words[number > 0]
            )
            for number, sample in enumerate(self.data)
        ]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        right = [
            answer == question.truth for answer, question in zip(answers, questions, strict=True)
        ]
        return Score({"accuracy": sum(right) / len(right)}, right)

    def score_in(self, run: Run, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        model = run.model()
        read, words = model.language.tokenizer, self.options.words
        ids = [read(word, add_special_tokens=False).input_ids[0] for word in words]
        likelier = []
        for question in questions:
            next_V = model.logits(question.prompt, images=list(question.images))[-1]
            likelier.append(words[int(next_V[ids].argmax())])
        (run.directory / "likelier.txt").write_text("\n".join(likelier) + "\n")
        return self.score(questions, likelier)
