"""Turns the flags of LLaVA's and TinyLLaVA's training scripts into a recipe.

What a flag means is that of the original at c121f04 (2024-05-12), with transformers' defaults of
its day for flags that are left out. Every flag that has no counterpart is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from llavakit import Component, RecipeError, Registry, Tracker, one_line
from llavakit.contracts.interfaces import PromptTemplate
from llavakit_plugins.scaffolding.names import NAMES
from llavakit_plugins.scaffolding.readable import refuse_unreadable
from llavakit_plugins.scaffolding.scripts import Command
from llavakit_plugins.scaffolding.toml_value import toml

_USUAL_DEVICES = 8  # of the paper's runs
_TEMPLATES = {"pretrain": "plain", "llama": "vicuna_v1", "v1": "vicuna_v1"}
_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant",
    "constant_with_warmup": "constant", "warmup_stable_decay": "wsd",
}  # fmt: skip


@dataclass
class Converted:
    """A recipe, and what could not be said in it."""

    recipe: dict[str, Any]
    remarks: list[str] = field(default_factory=list)

    def to_toml(self, head: str) -> str:
        """Return the recipe's text, with the remarks as comments at its head."""
        # a line break or a control character would end the comment, or the recipe
        lines = [f"# {one_line(text)}" for text in (head, *self.remarks)] + [""]
        tables = {name: value for name, value in self.recipe.items() if isinstance(value, dict)}
        for name, value in self.recipe.items():
            if name not in tables and name != "steps":
                lines.append(f"{name} = {toml(value)}")
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
        for step in self.recipe["steps"]:
            lines += ["", "[[steps]]", *(f"{key} = {toml(value)}" for key, value in step.items())]
        return "\n".join(lines) + "\n"


def convert(commands: Sequence[Command], devices: int | None = None) -> Converted:
    """Return one recipe with a step for each command, in order: alignment, then tuning.

    `devices` is on how many each was meant to run, where the launcher does not say it; 8 where
    nobody does. Raises RecipeError for flags whose values cannot be meant, or of two models, and
    for those of which no recipe can be made that is read again.
    """
    steps = [
        _Reading(command, devices, first=not number) for number, command in enumerate(commands)
    ]
    last = steps[-1]
    found = Converted({"name": last.run_name(), "seed": last.whole("seed", 42)})
    trackers = last.trackers()
    if trackers:
        found.recipe["trackers"] = trackers
    if (counts := {step.devices for step in steps}) and len(counts) == 1:
        found.recipe["machine"] = {"devices": last.devices}
    parts = [step.parts() for step in steps]
    for step, other in zip(steps, parts, strict=True):
        for name in ("vision", "language"):
            mine, theirs = other[name]["source"], parts[-1][name]["source"]
            if mine != theirs and not step.starts_from():
                raise RecipeError(
                    f"{step.command.where}: its {name} model is `{mine}`, that of the last script "
                    f"`{theirs}`; convert them one by one"
                )
    needs_model = steps[0].starts_from() is None
    if needs_model:
        found.recipe["model"] = parts[-1]
    found.recipe["steps"] = [
        step.as_step(parts[-1], needs_model=needs_model, own=own)
        for step, own in zip(steps, parts, strict=True)
    ]
    understood = [step.understood() for step in steps]
    refuse_unreadable(found.recipe, understood, parts)
    for step in steps:
        found.remarks += step.remarks_in(several=len(steps) > 1)
    return found


class _Reading:
    """The flags of one command, and which of them were understood."""

    def __init__(self, command: Command, devices: int | None, *, first: bool) -> None:
        self.command, self.first = command, first
        self.flags = dict(command.flags)
        self.used: set[str] = set()
        self.remarks: list[str] = []
        self.devices = command.devices or devices or _USUAL_DEVICES
        if command.devices is None and devices is None:
            self.remarks.append(
                f"the script does not say on how many devices it runs: taken for {self.devices} "
                "(--devices N says another number)"
            )

    # -- values --------------------------------------------------------------------------------

    def text(self, name: str, default: str = "") -> str:
        self.used.add(name)
        return self.flags.get(name, default)

    def yes(self, name: str) -> bool:
        return self.text(name, "False").lower() in ("true", "1", "yes")

    def number(self, name: str, default: float) -> float:
        text = self.text(name, str(default))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise RecipeError(f"{self.command.where}: --{name} {text:.80} is no number; fix it")
        return value

    def whole(self, name: str, default: int) -> int:
        value = self.number(name, default)
        if value != int(value):
            self.say(name, f"rounded up to {math.ceil(value)}")
        return math.ceil(value)

    def understood(self) -> Command:
        """Return the command with those flags alone that went into the recipe."""
        flags = {name: value for name, value in self.flags.items() if name in self.used}
        return replace(self.command, flags=flags)

    def say(self, name: str, sentence: str) -> None:
        value = self.flags.get(name)
        self.remarks.append(f"--{name}{f' {value}' if value else ''}: {sentence}")

    # -- the run -------------------------------------------------------------------------------

    def run_name(self) -> str:
        folder = PurePosixPath(self.text("output_dir") or "converted").name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.text("run_name") or folder).strip("-._")
        return name[:200] or "converted"

    def trackers(self) -> list[dict[str, str]]:
        self.used.add("report_to")
        names = [name for name in self.text("report_to", "none").split() if name != "none"]
        installed = _installed(Tracker)
        for name in names:
            if name not in installed:
                self.say(
                    "report_to", f"no tracker `{name}` is installed; llava-run plugins lists all"
                )
        known = [name for name in names if name in installed]
        return [{"use": "report"}, *({"use": name} for name in known)] if known else []

    # -- the model -----------------------------------------------------------------------------

    def starts_from(self) -> str | None:
        """Return the model that the first step starts from, if not from its parts."""
        if not self.first:  # it goes on from the step before
            self.used |= {"pretrained_model_path", "lora_weight_path", "pretrain_mm_mlp_adapter"}
            return None
        for name in ("pretrained_model_path", "lora_weight_path"):
            if self.text(name):
                return self.text(name)
        if adapter := self.text("pretrain_mm_mlp_adapter"):
            return str(PurePosixPath(adapter).parent)
        source = self.text("model_name_or_path")
        return source if "llava" in PurePosixPath(source).name.lower() else None

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return the table [model]."""
        tower = self.text("vision_tower")
        use = "siglip" if "siglip" in tower.lower() else "clip"
        if tower and not re.search("clip|siglip", tower.lower()):
            self.say("vision_tower", "taken for a CLIP; `siglip` and `timm` are the other encoders")
        # the original's scripts give -2; one that forgets the flag trains with the last layer
        layer = self.whole("mm_vision_select_layer", -1)
        if "mm_vision_select_layer" not in self.flags:
            self.remarks.append(
                "--mm_vision_select_layer is left out: the original's default is -1"
            )
        select = self.text("mm_vision_select_feature", "patch")
        vision = {"use": use, "source": tower, "layer": layer, "aspect": self.aspect()}
        vision |= {"select": select} if select != "patch" else {}
        source = self.text("model_name_or_path")
        llama = re.search("vicuna|llama", source.lower()) and "tinyllama-v" not in source.lower()
        length = self.whole("model_max_length", 512)
        language: dict[str, Any] = {"use": "vicuna" if llama else "causal-lm", "source": source}
        language |= {"dtype": "bfloat16", "max_length": length, **self.adapters()}
        return {
            "vision": {**vision, "dtype": "bfloat16"},
            "connector": self.connector(),
            "language": language,
            "template": {"use": self.template() or "vicuna_v1"},
        }

    def aspect(self) -> str:
        aspect = self.text("image_aspect_ratio", "square")
        if aspect not in ("square", "pad"):
            self.say(
                "image_aspect_ratio", "images are cut to their middle square; see model.tiling"
            )
        return "pad" if aspect == "pad" else "crop"

    def connector(self) -> dict[str, Any]:
        name = "mm_projector_type" if "mm_projector_type" in self.flags else "connector_type"
        kind = self.text(name, "linear")
        if found := re.fullmatch(r"mlp(\d+)x_gelu", kind):
            return {"use": "mlp", "depth": int(found[1])}
        if kind not in ("linear", "identity"):
            self.say(name, "no such connector is built in: taken for `linear`")
        return {"use": kind if kind in ("linear", "identity") else "linear"}

    def template(self) -> str:
        """Return the prompt template, where it is one of whole conversations."""
        name = "conv_version" if "conv_version" in self.flags else "version"
        version = self.text(name, "v0")
        use = _TEMPLATES.get(version, version)
        if use not in _installed(PromptTemplate):
            self.say(
                name, "no prompt template has this name: the tokenizer's chat template is used"
            )
            use = "chat-template"
        return "" if use == "plain" else use

    def adapters(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.yes("lora_enable") or self.text("tune_type_llm") in ("lora", "qlora"):
            options["lora"] = {
                "rank": self.whole("lora_r", 64),
                "alpha": self.whole("lora_alpha", 16),
                "dropout": self.number("lora_dropout", 0.05),
            }
            if self.text("lora_bias", "none") != "none":
                self.say("lora_bias", NAMES["lora_bias"].say)
        bits = self.whole("bits", 16)
        if bits == 4 or self.text("tune_type_llm") == "qlora":
            options["quantize"] = "nf4"
            if self.text("quant_type", "nf4") != "nf4":
                self.say("quant_type", "`nf4` in its place")
        elif bits != 16:
            self.say("bits", "weights are held in 4 or 16 bits: 16 are taken")
        return options

    # -- the step ------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """Return the parts that learn, each with its rate."""
        rate = self.number("learning_rate", 5e-5)
        # in the original this flag freezes all but the projector, whatever other flags say
        alone = self.yes("tune_mm_mlp_adapter")
        rates: dict[str, float] = {}
        if self.yes("unfreeze_mm_vision_tower") or self.text("tune_type_vision_tower") in (
            "full", "partially-tune",
        ):  # fmt: skip
            rates["vision"] = self.number("mm_vision_tower_lr", rate)
        if not self.yes("freeze_mm_mlp_adapter") and self.text("tune_type_connector") != "frozen":
            rates["connector"] = self.number("mm_projector_lr", rate)
        if not (alone or self.yes("freeze_backbone") or self.text("tune_type_llm") == "frozen"):
            rates["language"] = rate
        return rates

    def as_step(
        self, model: Mapping[str, Any], *, needs_model: bool, own: Mapping[str, Any]
    ) -> dict[str, Any]:
        rates = self.rates()
        step: dict[str, Any] = {"use": "finetune" if "language" in rates else "pretrain"}
        if (start := self.starts_from()) is not None:
            step["init"] = start
            step |= self._start(start, own)
        step["train"] = rates
        if not self.template():
            step["template"] = {"use": "plain"}
        elif needs_model and own["template"] != model["template"]:
            step["template"] = own["template"]
        if needs_model and own["vision"]["aspect"] != model["vision"]["aspect"]:
            step["prepare"] = {"aspect": own["vision"]["aspect"]}
        return {**step, **self._how(), "data": self._data()}

    def _start(self, start: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the layout of the start leaves out, and which of its options differ."""
        vision, language = own["vision"], dict(own["language"])
        load: dict[str, Any] = {}
        if self.text("model_name_or_path") != start and not self.text("pretrained_model_path"):
            load["base"] = language["source"]
        if vision["source"] and not self.text("pretrained_model_path"):
            load["vision"] = vision["source"]
        if template := self.template():
            load["template"] = template
        changed = {key: language[key] for key in ("lora", "max_length") if key in language}
        if "quantize" in language:
            self.remarks.append(
                f"4 bits: make a model folder of {start} first (llava-run import), and name that "
                "in `init`; another layout cannot be read so"
            )
            changed["quantize"] = language["quantize"]
        for name in ("mm_projector_type", "connector_type", "mm_vision_select_layer"):
            if name in self.flags:
                self.say(name, f"what {start} has counts")
        changes = {"vision": {"aspect": vision["aspect"]}, "language": changed}
        return {**({"load": load} if load else {}), "changes": changes}

    def _how(self) -> dict[str, Any]:
        # the Trainer counts samples for each device and micro-batch;
        # a recipe counts those of a step
        batch = self.whole("per_device_train_batch_size", 8)
        batch *= self.whole("gradient_accumulation_steps", 1) * self.devices
        how: dict[str, Any] = {"epochs": self.whole("num_train_epochs", 3), "batch_size": batch}
        if (steps := self.whole("max_steps", -1)) > 0:
            how["max_steps"] = steps
        schedule = self.text("lr_scheduler_type", "linear")
        how["warmup"] = self.number("warmup_ratio", 0.0)
        if schedule == "constant":  # without a warm-up, whatever its ratio
            how["warmup"] = 0.0
        if self.whole("warmup_steps", 0):
            self.say("warmup_steps", "`warmup` is a share of the steps; work it out")
        known = _SCHEDULES.get(schedule)
        how["schedule"] = known or "cosine"
        if known is None:
            self.say("lr_scheduler_type", f"there is no schedule `{schedule}`: `cosine` is taken")
        optimiser = self.text("optim", "adamw_torch")
        if "8bit" in optimiser and "adamw" in optimiser:
            how["optimiser"] = "adamw8bit"
        elif not optimiser.startswith("adamw"):
            self.say("optim", f"there is no optimiser `{optimiser}`: `adamw` is taken")
        how["weight_decay"] = self.number("weight_decay", 0.0)
        betas = [self.number("adam_beta1", 0.9), self.number("adam_beta2", 0.999)]
        how |= {"betas": betas} if betas != [0.9, 0.999] else {}
        clip = self.number("max_grad_norm", 1.0)
        how |= {"clip": clip} if clip != 1.0 else {}
        half = self.yes("bf16")
        if self.yes("fp16"):
            self.say("fp16", '`precision = "bf16"` in its place')
            half = True
        how["precision"] = "bf16" if half else "fp32"
        how["max_length"] = self.whole("model_max_length", 512)
        how["recompute"] = self.yes("gradient_checkpointing")
        how["workers"] = self.whole("dataloader_num_workers", 0)
        how["log_every"] = self.whole("logging_steps", 500)
        strategy = self.text("save_strategy", "steps")
        if strategy == "steps":
            how["checkpoint_every"] = self.whole("save_steps", 500)
        else:
            self.used.add("save_steps")
            self.say("save_strategy", f"{NAMES['save_strategy'].say}: the default is taken")
        limit = self.whole("save_total_limit", 0)
        if strategy != "no":
            how["keep"] = max(limit, 1)
            if limit < 1:  # of the Trainer: no limit
                given = self.flags.get("save_total_limit", "is left out")
                self.remarks.append(
                    f"--save_total_limit {given}: the Trainer keeps all checkpoints, a run here "
                    "the last `keep`: 1 is taken"
                )
        for name in ("evaluation_strategy", "eval_strategy"):
            if self.text(name, "no") != "no":
                self.say(name, "name `held_out` data and `validate_every`")
        return how

    def _data(self) -> dict[str, str]:
        data = {"use": "conversations", "path": self.text("data_path")}
        if not data["path"]:
            raise RecipeError(f"{self.command.where}: no --data_path; a step needs its data")
        return {**data, **({"images": images} if (images := self.text("image_folder")) else {})}

    def remarks_in(self, *, several: bool) -> list[str]:
        """Return what there is to say, and every flag that was not understood or has no meaning."""
        self.used |= {"deepspeed", "fsdp", "fsdp_transformer_layer_cls_to_wrap", "report_to"}
        self.used |= {"output_dir", "run_name", "seed"}
        for name in self.flags:
            if name in self.used or (self._is_off(name)):
                continue
            found = NAMES.get(name)
            why = f"no counterpart: {found.say}" if found else "no counterpart is known"
            self.say(name, why)
        place = f"{self.command.where}: " if several else ""
        return [f"{place}{remark}" for remark in dict.fromkeys(self.remarks)]

    def _is_off(self, name: str) -> bool:
        """Say whether a flag without a counterpart asks for what is so anyway."""
        return self.flags[name] == "False" and name in (
            "mm_use_im_start_end", "mm_use_im_patch_token", "tf32", "tune_mm_mlp_adapter",
        )  # fmt: skip


@cache
def _installed(kind: type[Component]) -> frozenset[str]:
    return frozenset(Registry.installed().origins(kind))
