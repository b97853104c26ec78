"""What options of other programs are called here: LLaVA's and TinyLLaVA's scripts, the Trainer's.

One table for the recipe's hints, for `llava-run convert-recipe` and for the documentation.
"""

from __future__ import annotations

from typing import NamedTuple


class Counterpart(NamedTuple):
    """Where something is said here."""

    ours: str  #: The key of a recipe, or a flag; empty where there is none.
    say: str  #: How it differs, or why there is none.


_LLAVA = {
    "model_name_or_path": Counterpart("model.language.source", "a LLaVA: `init` of the step"),
    "version": Counterpart("model.template", "`v1` is `vicuna_v1`; `plain` is one of the step"),
    "data_path": Counterpart("data.path", ""),
    "image_folder": Counterpart("data.images", ""),
    "vision_tower": Counterpart("model.vision.source", "with `use`: `clip`, `siglip` or `timm`"),
    "mm_vision_select_layer": Counterpart("model.vision.layer", "the original's default is -1"),
    "mm_vision_select_feature": Counterpart("model.vision.select", ""),
    "mm_projector_type": Counterpart("model.connector", "`mlp2x_gelu` is `mlp` of depth 2"),
    "pretrain_mm_mlp_adapter": Counterpart("init", "or the step before, in one recipe"),
    "image_aspect_ratio": Counterpart("model.vision.aspect", "`square` is `crop`"),
    "image_grid_pinpoints": Counterpart("model.tiling", ""),
    "mm_patch_merge_type": Counterpart("model.tiling", ""),
    "tune_mm_mlp_adapter": Counterpart("train", "`train = { connector = RATE }`"),
    "freeze_mm_mlp_adapter": Counterpart("train", "leave `connector` out"),
    "freeze_backbone": Counterpart("train", "leave `language` out"),
    "unfreeze_mm_vision_tower": Counterpart("train", "give `vision` a rate"),
    "mm_projector_lr": Counterpart("train.connector", ""),
    "mm_vision_tower_lr": Counterpart("train.vision", ""),
    "model_max_length": Counterpart("max_length", "of the step, and of `model.language`"),
    "lora_enable": Counterpart("model.language.lora", ""),
    "lora_r": Counterpart("model.language.lora.rank", ""),
    "lora_alpha": Counterpart("model.language.lora.alpha", ""),
    "lora_dropout": Counterpart("model.language.lora.dropout", ""),
    "lora_target_modules": Counterpart("model.language.lora.targets", ""),
    "lora_weight_path": Counterpart("init", "a folder of adapters, with `load.base`"),
    "lora_bias": Counterpart("", "biases do not learn"),
    "bits": Counterpart("model.language.quantize", '4 is `"nf4"`'),
    "quant_type": Counterpart("model.language.quantize", '`"nf4"` alone'),
    "double_quant": Counterpart("", "always as `nf4` has it here"),
    "mm_use_im_start_end": Counterpart("", "no markers around images: the first release alone"),
    "mm_use_im_patch_token": Counterpart("", "the vocabulary stays as it is"),
    "group_by_modality_length": Counterpart("", "a packed stream has no padding to save"),
    "lazy_preprocess": Counterpart("", "a data set is tokenised once, and kept"),
    "is_multimodal": Counterpart("", "seen by each sample's images"),
    "mpt_attn_impl": Counterpart("", "attention is chosen by the device"),
}  # fmt: skip

_TINY_LLAVA = {
    "conv_version": Counterpart("model.template", "`pretrain` is `plain` of the step"),
    "connector_type": Counterpart("model.connector", "`mlp2x_gelu` is `mlp` of depth 2"),
    "tune_type_llm": Counterpart("train", "`full`: give `language` a rate; `lora`: and `lora`"),
    "tune_type_vision_tower": Counterpart("train", "`full`: give `vision` a rate"),
    "tune_type_connector": Counterpart("train", "`full`: give `connector` a rate"),
    "tune_vision_tower_from_layer": Counterpart("", "the whole encoder learns, or none of it"),
    "pretrained_model_path": Counterpart("init", "or the step before, in one recipe"),
    "training_recipe": Counterpart("train", "what learns is said by `train`, and by `lora`"),
    "vision_tower2": Counterpart("", "an encoder made of two is a plugin"),
    "attn_implementation": Counterpart("", "attention is chosen by the device"),
    "tokenizer_use_fast": Counterpart("", "tokenizers are always fast ones"),
}

_TRAINER = {
    "output_dir": Counterpart("--out", "by default runs/NAME"),
    "run_name": Counterpart("name", ""),
    "report_to": Counterpart("trackers", 'a list: `trackers = [{ use = "wandb" }]`'),
    "num_train_epochs": Counterpart("epochs", ""),
    "max_steps": Counterpart("max_steps", ""),
    "per_device_train_batch_size": Counterpart("batch_size", "over all devices; what passes "
        "a device at once is `micro_batch_tokens`"),
    "gradient_accumulation_steps": Counterpart("batch_size", "over all micro-batches"),
    "learning_rate": Counterpart("train", "a rate for each part that learns"),
    "lr": Counterpart("train", "a rate for each part that learns"),
    "weight_decay": Counterpart("weight_decay", ""),
    "warmup_ratio": Counterpart("warmup", "a share of the steps"),
    "lr_scheduler_kwargs": Counterpart("schedule", "options beside `use`: `floor`, `decay`"),
    "warmup_steps": Counterpart("warmup", "a share of the steps, not their number"),
    "lr_scheduler_type": Counterpart("schedule", "`cosine`, `linear`, `constant` or `wsd`; "
        "`warmup_stable_decay` is `wsd`"),
    "max_grad_norm": Counterpart("clip", ""),
    "adam_beta1": Counterpart("betas", "both in one list"),
    "adam_beta2": Counterpart("betas", "both in one list"),
    "adam_epsilon": Counterpart("optimiser.eps", ""),
    "optim": Counterpart("optimiser", "`adamw_torch` is `adamw`, `adamw_bnb_8bit` is `adamw8bit`"),
    "beta": Counterpart("objective.beta", "of the step `prefer`"),
    "loss_type": Counterpart("objective.loss", "of the step `prefer`"),
    "label_smoothing": Counterpart("objective.label_smoothing", "of the step `prefer`"),
    "precompute_ref_log_probs": Counterpart("", "always so, in the step `prefer`"),
    "ref_model": Counterpart("", "the model as it is when the step `prefer` begins"),
    "bf16": Counterpart("precision", '`precision = "bf16"`'),
    "fp16": Counterpart("precision", '`"bf16"` in its place'),
    "tf32": Counterpart("", "what is not bf16 is multiplied in float32"),
    "gradient_checkpointing": Counterpart("recompute", ""),
    "torch_compile": Counterpart("compile", "each block by itself"),
    "logging_steps": Counterpart("log_every", ""),
    "save_steps": Counterpart("checkpoint_every", ""),
    "save_total_limit": Counterpart("keep", ""),
    "save_strategy": Counterpart("checkpoint_every", "counted in steps"),
    "eval_steps": Counterpart("validate_every", "with `held_out`"),
    "eval_strategy": Counterpart("validate_every", "with `held_out`"),
    "evaluation_strategy": Counterpart("validate_every", "with `held_out`"),
    "per_device_eval_batch_size": Counterpart("", "held-out data go through as training's do"),
    "load_best_model_at_end": Counterpart("keep_best", ""),
    "dataloader_num_workers": Counterpart("workers", ""),
    "resume_from_checkpoint": Counterpart("--resume", ""),
    "seed": Counterpart("seed", ""),
    "deepspeed": Counterpart("shard", "FSDP2, by itself where the language model learns"),
    "fsdp": Counterpart("shard", "FSDP2, by itself where the language model learns"),
    "fsdp_transformer_layer_cls_to_wrap": Counterpart("shard", "each block is divided by itself"),
    "group_by_length": Counterpart("", "a packed stream has no padding to save"),
    "max_seq_length": Counterpart("max_length", ""),
    "packing": Counterpart("", "a stream is always packed, and samples never see each other"),
    "train_dataset": Counterpart("data", ""),
    "eval_dataset": Counterpart("held_out", ""),
    "remove_unused_columns": Counterpart("", "rows keep what they have"),
    "cache_dir": Counterpart("", "set HF_HOME in the environment"),
    "local_rank": Counterpart("", "torchrun says it"),
}  # fmt: skip

SOURCES = {"LLaVA's scripts": _LLAVA, "TinyLLaVA's scripts": _TINY_LLAVA,
           "Hugging Face's Trainer and SFTTrainer": _TRAINER}  # fmt: skip
NAMES: dict[str, Counterpart] = {**_TRAINER, **_TINY_LLAVA, **_LLAVA}


def hint(name: str) -> str:
    """Return what an option of another program is called here; empty for one that is not known."""
    found = NAMES.get(name.removeprefix("--").replace("-", "_"))
    if found is None:
        return ""
    more = f": {found.say}" if found.say else ""
    return f"here it is `{found.ours}`{more}" if found.ours else f"there is none here{more}"
