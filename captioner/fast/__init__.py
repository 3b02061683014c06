"""What exists for speed alone. The program gives the same without it, later.

use_fast_step(config, model, device) -> bool                 # speed: whether training by it is wanted and possible
speed_up(config, model) -> Trainer's class, collator, loss   # trainer: in the place of CaptionTrainer and its own
FastCaptioner(config, count)                                 # captioning: in the place of Captioner
FastGreedyCaptioner(processor, generation, count)            # captioning: in the place of GreedyCaptioner
keep_features(file, limit, images) -> {image: (P, D)}        # features: the frozen ViT's outputs, in a file
"""
