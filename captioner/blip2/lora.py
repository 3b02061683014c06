"""LoRA on BLIP-2: which layers get it."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Blip2ForConditionalGeneration

# fc1 and fc2 name layers of the frozen ViT too, so LoRA's targets are expressions over whole module names.
LORA_TARGETS = {
    "qformer": r"qformer\..*\.(query|key|value|dense)",
    "lm": r"language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}
LORA_TARGETS["both"] = f"({LORA_TARGETS['qformer']}|{LORA_TARGETS['lm']})"


def add_lora(model, target: str, rank: int, alpha: int, dropout: float) -> PeftModel:
    """Put trainable LoRA matrices on the frozen model's linear layers that `target`, a key of LORA_TARGETS, names."""
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS[target], bias="none")
    with torch.device(model.device):  # where first weights are drawn: a CPU takes a second for them
        return get_peft_model(model, lora)


def get_blip2(model) -> Blip2ForConditionalGeneration:
    """The BLIP-2 inside a PeftModel, with its LoRA layers; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
