"""What exists for speed alone. The program gives the same without it, later.

supports(model) -> bool                                      # caption_loss, generation: whether it is made for it
FastStep(model, ...)(batch) -> loss                          # a training pass, with its gradients
FastGenerator(model, ...).generate(images, length) -> tokens
open_store(config, model, processor) -> VisionStore          # the ViT's outputs on disk
compute_outputs(vision, ..., images, store) -> (N, P, D)     # and in memory
start(config) -> process                                     # compile_kernels: compiles beside the imports
"""
