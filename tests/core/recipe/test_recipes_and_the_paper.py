"""Built-in recipes carry out what the paper and the original's scripts do, and plans say so."""

from __future__ import annotations

import pytest
from tests.conftest import make_tokenizer
from tests.core.recipe.test_builtin_recipes import load, plan

from llavakit import PromptTemplate, Recipe, Registry, Turn, Use


def rendered(recipe: Recipe, step: int, question: str, answer: str) -> str:
    """Return the text that a training step of a recipe makes of one exchange."""
    use = recipe.steps[step].options.get("template") or recipe.model.template
    assert use is not None
    chosen = Use[PromptTemplate].model_validate(use if isinstance(use, dict) else use.model_dump())
    template = Registry.installed().build(chosen)
    turns = (Turn("human", question), Turn("gpt", answer))
    return "".join(segment.text for segment in template.segments(turns, make_tokenizer()))


def test_the_papers_recipe_asks_for_each_caption_and_puts_the_image_at_either_end() -> None:
    recipe = load("llava13b-paper")
    for step in (0, 1):
        texts = [rendered(recipe, step, f"<image>\nWhat is it, {n}?", "A cat.") for n in range(64)]
        front = [f"### Human: <image>\nWhat is it, {n}?\n" in t for n, t in enumerate(texts)]
        behind = [f"### Human: What is it, {n}?\n<image>\n" in t for n, t in enumerate(texts)]
        assert all(a != b for a, b in zip(front, behind, strict=True))
        assert 16 < sum(front) < 48
        assert all(t.endswith("### Assistant: A cat.\n### ") for t in texts)
    usual = load("llava13b")
    assert rendered(usual, 0, "Describe it.\n<image>", "A cat.") == "<image>A cat.\n"
    assert "USER: <image>\nWhat? ASSISTANT:" in rendered(usual, 1, "What?\n<image>", "A cat.")


def test_scienceqa_keeps_the_image_behind_the_question() -> None:
    recipe = load("scienceqa13b")
    assert "USER: Which?\n<image> ASSISTANT: B." in rendered(recipe, 1, "Which?\n<image>", "B.")


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "rates", "quantized"),
    [
        ("llava7b-lora", 64, 16, {"connector": 2e-5, "language": 2e-5}, False),
        ("llava7b-qlora", 64, 16, {"connector": 2e-5, "language": 2e-5}, True),
        ("finetune-task-lora", 128, 256, {"connector": 2e-5, "language": 2e-4}, False),
    ],
)
def test_adapters_are_those_of_the_originals_scripts(
    name: str, rank: int, alpha: float, rates: dict[str, float], quantized: bool
) -> None:
    step = next(use for use in load(name).steps if use.use == "finetune")
    language = step.options["changes"]["language"]
    assert (language["lora"]["rank"], language["lora"]["alpha"]) == (rank, alpha)
    assert language["lora"].get("dropout", 0.05) == 0.05
    assert language.get("quantize") == ("nf4" if quantized else None)
    assert step.options["train"] == rates
    assert step.options["batch_size"] == 128
    # a matrix of n by m has rank * (n + m) weights beside it
    width, inner, layers = (5120, 13824, 40) if "task" in name else (4096, 11008, 32)
    counted = rank * layers * (4 * 2 * width + 3 * (width + inner))
    made = plan(name).steps
    (note,) = [plan.note for plan in made.values() if "language" in plan.trained]
    assert f"of `language`, {counted:,} parameters learn" in note


def test_weights_of_4_bits_take_less_memory_in_stage_2_alone() -> None:
    # on one device: adapters beside weights of 4 bits are not divided among several, others are
    lora, qlora = (
        plan(name, "machine.devices=1").steps for name in ("llava7b-lora", "llava7b-qlora")
    )
    assert lora["01-pretrain"] == qlora["01-pretrain"]
    whole, small = lora["02-finetune"].memory_gb, qlora["02-finetune"].memory_gb
    assert whole
    assert small
    assert whole - small == pytest.approx(6.6 * 1.484, rel=0.03)  # 2 bytes a weight, or 0.516


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        # of transformers' own LlavaForConditionalGeneration, in billions
        ("llava-hf/llava-1.5-7b-hf", 7.06),
        ("llava-hf/llava-1.5-13b-hf", 13.35),
        ("liuhaotian/llava-v1.5-7b", 7.06),
        ("liuhaotian/llava-v1.5-13b", 13.35),
    ],
)
def test_plans_know_the_published_models(source: str, parameters: float) -> None:
    made = plan("finetune-task", f"steps.1.init={source}")
    assert made.visual_tokens == 576
    total = sum(part.parameters for part in made.parts.values())
    assert total / 1e9 == pytest.approx(parameters, abs=0.02)
    assert made.steps["01-finetune"].tflop
