"""BDD100K's labels -> facts of a frame <-> text. No torch, no images.

fetch_labels(dataset, subset) -> paths               # download: label files from Kaggle
read_labels(paths, report, options) -> frames        # label_files: a name and the facts of each frame
Facts(time_of_day, weather, scene, traffic_light, objects)
describe(facts, style) -> text
read_caption(text) -> Reading                        # the facts in a text, and what could not be read
mark_caption(text, facts, absent) -> pieces          # each with a verdict
"""
