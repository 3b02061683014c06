"""What exists for speed alone. The program does the same without it, later.

FastWay(config, model_config, device)        # door: in the place of PlainWay, for main.py
FastCaptioner(config, images)                # captioning: in the place of Captioner, for eval.py
"""
