"""Full-size BLIP-2 OPT-2.7B with random weights, saved in the hub's layout: for speed and memory, not for captions.

    python -m benchmarks.full_size FOLDER      # 7.5 GB, seconds on a GPU

The architecture is that of Salesforce/blip2-opt-2.7b (its config.json gives the same module shapes), and so are the
token ids that matter: <image> 50265, newline 50118 as the end token, padding 1. Captions come out as noise.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GPT2Tokenizer,
    OPTConfig,
)

from demo.pretrain import build_processor

IMAGE_TOKEN, END_TOKEN, PADDING, VOCABULARY = 50265, 50118, 1, 50304


def build_full_size_processor() -> Blip2Processor:
    """The demo's processor at 224 px and 32 queries, its vocabulary filled up to OPT's ids."""
    small = build_processor(side=224, queries=32)
    vocab = {token: id for token, id in small.tokenizer.get_vocab().items() if token != "<image>"}
    vocab |= {f"unused{id}": id for id in range(len(vocab), IMAGE_TOKEN)}
    vocab[f"unused{END_TOKEN}"], vocab["Ċ"] = vocab["Ċ"], END_TOKEN
    merges = [tuple(merge) for merge in small.tokenizer._merges]
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return Blip2Processor(
        small.image_processor, GPT2Tokenizer(vocab=vocab, merges=merges, **special), num_query_tokens=32
    )


def build_full_size_config() -> Blip2Config:
    return Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, encoder_hidden_size=1408
        ).to_dict(),
        text_config=OPTConfig(
            hidden_size=2560,
            ffn_dim=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            word_embed_proj_dim=2560,
            vocab_size=VOCABULARY,
            bos_token_id=2,
            eos_token_id=END_TOKEN,
            pad_token_id=PADDING,
        ).to_dict(),
        num_query_tokens=32,
        image_token_index=IMAGE_TOKEN,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Blip2ForConditionalGeneration(build_full_size_config())
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    model.save_pretrained(folder)
    build_full_size_processor().save_pretrained(folder)
    print(f"{model.num_parameters() / 1e9:.3f} billion parameters saved to {folder}")


if __name__ == "__main__":
    main()
