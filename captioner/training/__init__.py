"""The Trainer, and what lets a run survive: what main.py calls, in this order.

check_run(config, train, choose_way)                             # check: every stage once, nothing is kept
open_run(config, device) -> run                                  # run: a new one or one that goes on; None: finished
PlainWay(config)                                                 # plain: how images, model and passes are made ready
make_callbacks(run, dataset, captioner) -> callbacks             # dashboard: losses, curves, captions
train_lora(run, model, datasets, parts, callbacks) -> trainer    # train: to the end, from the newest intact checkpoint
save_run(run, trainer, processor, generation, splits)            # run: the adapter and what eval.py needs
"""
