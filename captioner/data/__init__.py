"""Captions, images and the splits that are trained and tested on.

caption_labels(source, paths, output, run_dir) -> report     # label_captions: labels to a captions CSV
read_captions(path) -> table of name, caption, split, group  # caption_files: captions files of any usual kind
prepare_splits(config, run_dir) -> {split: examples}         # splits
read_split(folder, split) -> examples                        # splits: of an adapter
open_image(path) -> PIL image                                # image_decoding: upright, 8 bits, RGB
read_batches(read, items, collate) -> batches                # parallel: by processes, in order
"""
