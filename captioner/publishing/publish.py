"""What is made of a saved adapter: its model card; the merged model and the copy on the hub, where asked for."""

from captioner.publishing.hub import push_captions, push_to_hub
from captioner.publishing.merge import merge_adapter
from captioner.publishing.model_card import write_model_card
from captioner.runtime.errors import go_on_without
from config import TrainConfig


def publish(config: TrainConfig) -> None:
    output = config.run.output
    if not (output / "README.md").exists():  # else of this run, resumed after its end
        with go_on_without("model card"):
            write_model_card(output)
    if config.run.merge:
        merged = output.with_name(output.name + "-merged")
        merge_adapter(output, merged)
        print(f"merged model saved to {merged}")
    if config.run.push_to_hub:
        print(f"uploaded to {push_to_hub(output, config.run.push_to_hub)}")
    if config.run.push_captions:
        print(f"captions uploaded to {push_captions(output, config.run.push_captions)}")
