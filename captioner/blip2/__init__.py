"""The model as transformers and peft have it.

load_model(source, load_in_4bit, device) -> model            # frozen
add_lora(model, target, rank, alpha, dropout) -> model
load_finetuned(folder, device, base) -> processor, model     # what main.py saved
CaptionCollator(model_config)(rows) -> batch                 # labels masked to the caption
generate_captions(model, processor, pixel_values, generation) -> texts
check_model_folder(folder)                                   # raises UserError for what might run code
"""
