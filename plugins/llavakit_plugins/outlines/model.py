"""A whole model's shapes, as `LlavaModel` has them. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from llavakit import ModelRecipe, PromptTemplate, Registry, Tiling, Use, View, Views
from llavakit_plugins.outlines.weights import NotPlain, Weight


@dataclass
class ModelOutline:
    """A model of outlines, joined as `LlavaModel` joins networks."""

    vision: Any
    connector: Any
    language: Any
    template: PromptTemplate
    choices: dict[str, dict[str, Any]]
    tiling: Tiling | None = None
    image_newline: Weight | None = None
    training: bool = False

    def __post_init__(self) -> None:
        tiling, patches = self.tiling, self.vision.tokens(self.vision.image_size)
        self.visual_tokens = self.connector.tokens(patches)
        if self.image_newline is None and tiling is not None and tiling.separates:
            self.image_newline = Weight((self.language.width,))
        if tiling is not None and not tiling.varies:
            self.tiling = None
        if self.tiling is not None and self.tiling.pools and self.visual_tokens != patches:
            raise NotPlain("its tiling does not fit")  # LlavaModel says why

    @property
    def views(self) -> Views:
        return Views(self.tiling, View(self.vision.image_size, self.visual_tokens))

    def train(self, training: bool) -> Self:
        self.training = training
        return self


def outline_model(recipe: ModelRecipe, registry: Registry) -> ModelOutline:
    """Return the shapes of a recipe's model. Raises NotPlain, or LlavaError as a network would."""

    def build(use: Use[Any], **widths: Any) -> Any:
        return registry.build(use, shapes=True, **widths)

    vision, language = build(recipe.vision), build(recipe.language)
    widths = {"vision_width": vision.width, "language_width": language.width}
    patches = vision.tokens(vision.image_size)
    connector = build(recipe.connector, **widths, patches=patches)
    template = recipe.template or Use[PromptTemplate](use=language.default_template)
    tiling = recipe.tiling or Use[Tiling](use=vision.default_tiling)
    model = ModelOutline(
        vision, connector, language, registry.build(template),
        choices={name: use.model_dump(mode="json") for name, use in recipe if use is not None},
        tiling=registry.build(tiling),
    )  # fmt: skip
    if len(model.views.of().index_RK) >= language.max_length:
        raise NotPlain("an image is longer than its context")  # `join_model` says it
    return model
