"""The flags of LLaVA's published training scripts (haotian-liu/LLaVA at c121f04), as data.

Every script has those of `SHARED`; `SCRIPTS` has what else each has, and what differs.
"""

from __future__ import annotations

from pathlib import Path

SHARED = {
    "deepspeed": "./scripts/zero2.json", "mm_vision_select_layer": "-2",
    "mm_use_im_start_end": "False", "mm_use_im_patch_token": "False", "bf16": "True",
    "num_train_epochs": "1", "per_device_train_batch_size": "16",
    "per_device_eval_batch_size": "4", "gradient_accumulation_steps": "1",
    "evaluation_strategy": "no", "save_strategy": "steps", "save_steps": "50000",
    "save_total_limit": "1", "learning_rate": "2e-5", "weight_decay": "0.", "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine", "logging_steps": "1", "tf32": "True",
    "model_max_length": "2048", "gradient_checkpointing": "True", "dataloader_num_workers": "4",
    "lazy_preprocess": "True", "report_to": "wandb",
}  # fmt: skip
_V1 = {
    "model_name_or_path": "./checkpoints/$MODEL_VERSION", "version": "$PROMPT_VERSION",
    "vision_tower": "openai/clip-vit-large-patch14",
}  # fmt: skip
_V1_PRETRAIN = {
    **_V1, "tune_mm_mlp_adapter": "True", "learning_rate": "2e-3", "save_steps": "24000",
    "data_path": "/path/to/pretrain_data.json", "image_folder": "/path/to/images",
    "output_dir": "./checkpoints/llava-$MODEL_VERSION-pretrain",
}  # fmt: skip
_V1_FINETUNE = {
    **_V1, "data_path": "./playground/data/llava_instruct_80k.json",
    "image_folder": "/path/to/coco/train2017",
    "pretrain_mm_mlp_adapter": "./checkpoints/llava-$MODEL_VERSION-pretrain/mm_projector.bin",
    "output_dir": "./checkpoints/llava-$MODEL_VERSION-finetune",
}  # fmt: skip
_V15 = {
    "model_name_or_path": "lmsys/vicuna-13b-v1.5", "mm_projector_type": "mlp2x_gelu",
    "vision_tower": "openai/clip-vit-large-patch14-336",
}  # fmt: skip
_V15_FINETUNE = {
    **_V15, "deepspeed": "./scripts/zero3.json", "version": "v1", "image_aspect_ratio": "pad",
    "data_path": "./playground/data/llava_v1_5_mix665k.json", "image_folder": "./playground/data",
    "group_by_modality_length": "True", "output_dir": "./checkpoints/llava-v1.5-13b",
}  # fmt: skip
_V15_ADAPTER = "./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin"
_V15_LORA = {
    "lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "mm_projector_lr": "2e-5",
    "learning_rate": "2e-4", "output_dir": "./checkpoints/llava-v1.5-13b-lora",
}  # fmt: skip
_TASK = {"model_name_or_path": "liuhaotian/llava-v1.5-13b"}

SCRIPTS: dict[str, dict[str, str]] = {
    "pretrain": _V1_PRETRAIN,
    "pretrain_xformers": {
        **_V1_PRETRAIN, "bf16": "False", "tf32": "False", "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "4",
    },
    "finetune": _V1_FINETUNE,
    "finetune_full_schedule": {
        **_V1_FINETUNE, "data_path": "./playground/data/llava_instruct_158k.json",
        "num_train_epochs": "3",
    },
    "finetune_lora": {**_V1_FINETUNE, "lora_enable": "True"},
    "finetune_qlora": {**_V1_FINETUNE, "lora_enable": "True", "bits": "4"},
    "finetune_sqa": {
        **_V1, "model_name_or_path": "lmsys/vicuna-13b-v1.3", "num_train_epochs": "12",
        "data_path": "/Data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json",
        "image_folder": "/Data/ScienceQA/data/scienceqa/images/train",
        "pretrain_mm_mlp_adapter": "./checkpoints/huggingface/liuhaotian/"
        "llava-pretrain-vicuna-13b-v1.3/mm_projector.bin",
        "output_dir": "./checkpoints/llava-vicuna-13b-v1.3-ScienceQA_QCM_LEA-12e",
    },
    "v1_5/pretrain": {
        **_V15, "version": "plain", "tune_mm_mlp_adapter": "True", "learning_rate": "1e-3",
        "data_path": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_folder": "./playground/data/LLaVA-Pretrain/images",
        "per_device_train_batch_size": "32", "save_steps": "24000",
        "output_dir": "./checkpoints/llava-v1.5-13b-pretrain",
    },
    "v1_5/finetune": {**_V15_FINETUNE, "pretrain_mm_mlp_adapter": _V15_ADAPTER},
    "v1_5/finetune_lora": {
        **_V15_FINETUNE, **_V15_LORA, "pretrain_mm_mlp_adapter": _V15_ADAPTER,
    },
    "v1_5/finetune_task": {**_V15_FINETUNE, **_TASK},
    "v1_5/finetune_task_lora": {**_V15_FINETUNE, **_V15_LORA, **_TASK},
}  # fmt: skip

OPEN = {"MODEL_VERSION": "vicuna-v1-3-7b", "PROMPT_VERSION": "v1"}  #: What most leave to be set.


def write_script(folder: Path, name: str, **changes: str | None) -> Path:
    """Write a script of the usual form with one set of flags; None takes a flag out."""
    flags = {**SHARED, **SCRIPTS[name], **changes}
    words = [f"--{key} {value}" for key, value in flags.items() if value is not None]
    own = "PROMPT_VERSION=plain\n" if name.startswith("pretrain") else ""
    path = folder / f"{name.replace('/', '_')}.sh"
    command = " \\\n    ".join(["deepspeed llava/train/train_mem.py", *words])
    path.write_text(f"#!/bin/bash\n\n# MODEL_VERSION=none\n{own}\n{command}\n", encoding="utf-8")
    return path
