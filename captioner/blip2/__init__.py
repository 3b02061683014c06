"""The model as transformers and peft have it.

load_model(source, load_in_4bit, device) -> model            # frozen
add_lora(model, target, rank, alpha, dropout) -> model
load_finetuned(folder, device, base) -> model, processor, generation settings   # what main.py saved
CaptionCollator(model_config)(rows) -> batch                 # labels masked to the caption
load_captioner(folder)(image) -> text                        # of a path, a PIL image, an array, or a list of them
check_model_folder(folder)                                   # raises UserError for what might run code
"""
