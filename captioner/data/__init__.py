"""Captions, images and the splits that are trained and tested on.

caption_labels(config, paths, output, run_dir) -> report     # labels to a captions CSV
read_captions(path) -> table of name, caption, split, group # captions files of any usual kind
prepare_splits(config, run_dir) -> {split: examples}
read_split(folder, split) -> examples                      # of an adapter
open_image(path) -> PIL image                              # upright, 8 bits, RGB
read_batches(read, items, collate) -> batches                # by processes, in order
"""
