"""What of a model can be pruned: its ZIG partition, found without downloading or making any weights.

    python recipes/inspect_model.py google-bert/bert-base-uncased      # a Hub name
    python recipes/inspect_model.py path/to/model                      # a local folder
    python recipes/inspect_model.py whisper                            # a model type, from its default config

(It can't be called inspect.py: that would hide Python's own module of the name from the other recipes.)
"""

import argparse
import json

import torch
import transformers as tf

import hf_oto


def config_of(name: str) -> tf.PreTrainedConfig:
    """The config of a model type, a folder or a Hub name."""
    if name in tf.CONFIG_MAPPING:
        return tf.AutoConfig.for_model(name)
    return tf.AutoConfig.from_pretrained(name)


def build(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    """The class that the config names, else the base model, on the meta device."""
    with torch.device("meta"):
        for name in config.architectures or ():
            if name in dir(tf):
                return getattr(tf, name)(config)
        return tf.AutoModel.from_config(config)


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hub name, a folder, or a model type")
    parser.add_argument("--protect", nargs="*", default=[], help="regular expressions of names not to prune")
    parser.add_argument("--json", action="store_true", help="print all axes with their members, for machines")
    options = parser.parse_args()
    model = build(config_of(options.model)).eval()
    partition = hf_oto.partition_zigs(model, protect=options.protect)
    if options.json:
        print(json.dumps(partition.to_dict()))
    else:
        print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
        print(partition)


if __name__ == "__main__":
    main()
