"""The captions file, the images and the splits that are trained and tested on.

caption_labels(config, paths, output, run_dir) -> report     # labels to a captions CSV
read_captions(path) -> {name: caption}
match_images(captions, {name: path}) -> examples
split_by_ride(names, shares, seed) -> {split: names}
open_image(path) -> PIL image                              # upright, 8 bits, RGB
read_batches(read, items, collate) -> batches                # by processes, in order
"""
