"""The model as transformers and peft have it.

load_model(source, load_in_4bit, device) -> model            # loading: frozen
add_lora(model, target, rank, alpha, dropout) -> model       # lora
load_finetuned(folder, device, base) -> model, processor, generation settings   # loading: what main.py saved
CaptionCollator(model_config)(rows) -> batch                 # batches: labels masked to the caption
load_captioner(folder)(image) -> text                        # captioning: of a path, a PIL image, an array or a list
check_model_folder(folder)                                   # trust: raises UserError for what might run code
"""
