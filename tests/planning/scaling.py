"""The runs of docs/scaling.md: what a row of its table says, as settings."""

import json

import yaml

from grpo_lightning.planning.budget import budget_of
from grpo_lightning.planning.settings import Settings

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
MODELS = {
    "0.5B": {
        **LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "sizes": (896, 4864, 24, 14, 2, 151936),
    },
    "8B": {**LLAMA, "sizes": (4096, 14336, 32, 32, 8, 128256)},
    "70B": {**LLAMA, "sizes": (8192, 28672, 80, 64, 8, 128256)},
}
KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
GIB = 2**30


def budget(folder, model, gpus, strategy, gather, dtype, precision, trains, prompts, accumulate, max_rows):
    """Of 8 completions of 1,024 tokens for each prompt of 512, with gradient checkpointing and no reference."""
    sizes = MODELS[model]
    config = {key: value for key, value in sizes.items() if key != "sizes"}
    (folder / "config.json").write_text(json.dumps(config | dict(zip(KEYS, sizes["sizes"], strict=True))))
    init_args = {
        "policy": {"class_path": "PretrainedPolicy", "init_args": {"path": str(folder), "dtype": dtype}},
        "sampling": {"max_new_tokens": 1024},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
        "prompts_per_iteration": prompts,
        "group_size": 8,
        "engine": {"class_path": "InProcessEngine", "init_args": {"max_rows": max_rows, "gather": gather}},
        "gradient_checkpointing": True,
        "lora": {"rank": 16} if trains == "LoRA" else None,
    }
    chosen = strategy
    if strategy == "fsdp2":
        chosen = {"class_path": "FSDP2Strategy", "init_args": {"compute_dtype": "bfloat16"}}
    elif strategy.startswith("deepspeed"):
        chosen = {"class_path": "ZeROStrategy", "init_args": {"stage": int(strategy[-1])}}
    settings = {
        "model": {"class_path": "GRPOModule", "init_args": init_args},
        "trainer": {"strategy": chosen, "precision": precision, "accumulate_grad_batches": accumulate},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return budget_of(Settings([str(folder / "run.yaml")]), ranks=gpus, prompt_tokens=512)
