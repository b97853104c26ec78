"""Trains the recipe's vision encoder and language model from random weights, so that both stages
start from pretrained parts, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping

from llavakit import Generator, InputPath, Options, Outcome, Run, Step, Use
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Curves
from llavakit_plugins.generation.contexts import read_contexts
from llavakit_plugins.training.backbones.options import ContrastiveOptions, TextOptions

_TOKENS = 60  # of a document, roughly: for plans only


class BackbonesOptions(Options):
    contexts: tuple[InputPath, ...]
    """Captions and boxes, the easiest file first."""
    images: InputPath
    generator: Use[Generator]
    """Writes the dialogues that the language model reads as text."""
    contrastive: ContrastiveOptions = ContrastiveOptions()
    text: TextOptions = TextOptions()


class Backbones(Step):
    """Leaves a model folder with a new connector between trained backbones."""

    name = "backbones"
    Options = BackbonesOptions
    needs_model = True

    def __init__(self, options: BackbonesOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        import torch

        from llavakit import save_model
        from llavakit_plugins.training.backbones.contrastive import clip_training
        from llavakit_plugins.training.backbones.side_by_side import optimise
        from llavakit_plugins.training.backbones.text import documents, language_training
        from llavakit_plugins.training.backbones.tokenizer import train_tokenizer

        options = self.options
        files = [list(read_contexts(path)) for path in options.contexts]
        generator = run.build(options.generator)
        # the model is made after the seed is set: its random weights are the start of this training
        torch.manual_seed(run.seed)
        model = run.model.new()
        language, template = model.language, model.template
        # what is easy to see is no help in reading: the text is of the last file alone
        corpus = list(documents(files[-1], generator, template, train_tokenizer([], 0), run.seed))
        texts = ("".join(segment.text for segment in document) for document in corpus)
        # the vocabulary is limited to the head's size,
        # as the recipe has fixed that before any text is seen
        language.tokenizer = train_tokenizer(texts, language.head.out_features)
        seen, read = optimise(
            run,
            clip_training(
                model.vision, language.tokenizer, files, options.images, options.contrastive, run
            ),
            language_training(language, corpus, options.text, run),
        )
        save_model(model, run.directory / "model")
        curves = [
            _curve("CLIP: contrastive loss", "contrastive", seen),
            _curve("Language model: loss on text", "language", read),
        ]
        return Outcome({"contrastive_loss": seen[-1][1], "language_loss": read[-1][1]}, curves)

    @classmethod
    def leaves(cls, options: BackbonesOptions) -> Mapping[str, bool]:
        return {"model": True}

    @classmethod
    def plan(cls, options: BackbonesOptions, planner: Planner) -> StepPlan:
        vision, text = options.contrastive, options.text
        # the class token is an encoder's token too, although the language model never gets it
        patches = planner.model.vision.tokens(planner.model.vision.image_size) + 1
        seen = vision.steps * vision.batch_size
        read = text.steps * text.batch_size
        # 2 operations a parameter and token in the forward pass,
        # and twice as many in the backward pass
        flop = 6.0 * planner.parameters("vision") * patches * seen
        flop += 6.0 * planner.parameters("language") * _TOKENS * read
        return StepPlan(
            samples=seen + read,
            tokens=seen * patches + read * _TOKENS,
            steps=vision.steps + text.steps,
            tflop=flop / 1e12,
            trained=("vision", "language"),
        )


def _curve(title: str, name: str, losses: list[tuple[int, float]]) -> Curves:
    points = [(float(at), loss) for at, loss in losses]
    return Curves(title=title, x="step", y="loss", series={name: points})
