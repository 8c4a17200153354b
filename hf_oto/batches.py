"""Batches that are made from the config of a Transformers model, where the user gives none.

Worked example: of a config with vocab_size=100 the batch is {"input_ids": ...}, a few tokens below 100. A model that
also takes images is tried with a batch of both first, and then with the text alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .calls import raise_if_out_of_memory, tensors_of
from .evaluating import evaluating
from .modeling_oto import OTOError

INPUTS_MADE = ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids")


def make_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Small batches of text, images or sound, made from a Transformers config, to be tried one after the other.

    The first batches have all that the forward takes, so that every tower runs. Images have their places in the text
    if the model wants that. The last batch has the model's main input alone.

    Raises:
        OTOError: the model reads something else.
    """
    made: dict[str, Tensor] = {}
    main_input = ""
    if isinstance(model, PreTrainedModel):
        main_input = model.main_input_name
        accepted = inspect.signature(model.forward).parameters
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        for name in INPUTS_MADE:
            value = _made(name, model.config) if name in accepted else None
            if value is None:
                continue
            dtype = model.dtype if value.is_floating_point() else value.dtype
            made[name] = value.to(device, dtype)
    if {"input_ids", "pixel_values"} <= made.keys():
        yield from _with_images(model, made)
    if made:
        yield made
    if main_input not in made:
        class_name = type(model).__name__
        raise OTOError(
            f"can't make a batch for {class_name} from its config: pass inputs, the arguments of its forward"
        )
    with_decoder = (main_input, "decoder_input_ids")  # an encoder-decoder runs on both or on the main input alone
    yield {name: value for name, value in made.items() if name in with_decoder}
    yield {main_input: made[main_input]}


def _with_images(model: PreTrainedModel, made: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Batches whose texts begin with a token for every feature of their image.

    The features are counted by encoding the images, in each of the forms that models take images in.
    """
    image_token = _in_config(model.config, "image_token_id")
    encode = getattr(model, "get_image_features", None)
    if image_token is None or encode is None or model.device.type == "meta":
        return
    encoder_takes = inspect.signature(encode).parameters.keys()
    model_takes = inspect.signature(model.forward).parameters
    for images in _forms_of_images(model.config, made["pixel_values"]):
        if not images.keys() <= encoder_takes:
            continue
        try:
            with evaluating(model):
                encoded = encode(**images)
        except Exception as error:  # the model takes images in another form
            raise_if_out_of_memory(error)
            continue
        features = tensors_of(getattr(encoded, "pooler_output", encoded))
        width = model.get_input_embeddings().weight.shape[1]
        num_features = sum(feature.numel() for feature in features) // width  # of both images
        text = made["input_ids"]  # (2, length)
        text = torch.where(text == image_token, text - 1, text)  # no random token may stand for an image
        places = text.new_full((2, num_features // 2), image_token)
        ids = torch.cat([places, text], 1)
        batch = made | images | {"input_ids": ids}
        if "mm_token_type_ids" in model_takes:
            batch["mm_token_type_ids"] = (ids == image_token).long()
        yield batch


def _forms_of_images(config: PreTrainedConfig, pixels: Tensor) -> list[dict[str, Tensor]]:
    """The same two images, (2, channels, height, width), as the arguments that models of different kinds take."""
    sizes = torch.tensor([pixels.shape[-2:]] * 2, device=pixels.device)
    forms = [
        {"pixel_values": pixels, "image_sizes": sizes},
        {"pixel_values": pixels},
        {"pixel_values": pixels[:, None]},  # several images, or tiles of one, in each example
    ]
    patch_size = _in_config(config, "patch_size")
    if isinstance(patch_size, int):
        # Patches in rows, and a grid of (time, height, width) for each image, whose sides are multiples of the merge.
        merged_side = _in_config(config, "spatial_merge_size") or 1
        side = 2 * merged_side
        frames = _in_config(config, "temporal_patch_size") or 1
        num_channels = pixels.shape[1]
        values_of_patch = num_channels * frames * patch_size**2
        grid = torch.tensor([[1, side, side]] * 2, device=pixels.device)  # (images, 3)
        patches = pixels.new_ones(2 * side**2, values_of_patch)
        forms.insert(0, {"pixel_values": patches, "image_grid_thw": grid})
    return forms


def _in_config(config: PreTrainedConfig, key: str) -> Any:
    """The value of a key in a config, or else in the first of its parts that has one; None if none has."""
    parts = [config]
    for name in config.sub_configs:
        part = vars(config).get(name)
        if part is not None:
            parts.append(part)
    for part in parts:
        value = getattr(part, key, None)
        if value is not None:
            return value
    return None


def _made(name: str, config: PreTrainedConfig) -> Tensor | None:
    """One input of two examples, None if the config doesn't say how large the input is."""
    # the same batch in every process
    generator = torch.Generator().manual_seed(0)
    if name.endswith("input_ids"):
        vocab_size = _in_config(config, "vocab_size")
        if not vocab_size:
            return None
        return torch.randint(3, vocab_size, (2, 16), generator=generator)  # below 3 are special tokens, mostly
    shape: tuple[int | None, ...] = (4000,)  # a quarter of a second of sound
    if name == "pixel_values":
        size = _in_config(config, "image_size") or 64
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        num_channels = _in_config(config, "num_channels") or 3
        shape = (num_channels, *sides)
    if name == "input_features":
        positions = _in_config(config, "max_source_positions") or 50
        frames = 2 * positions  # the encoder halves their number
        shape = (_in_config(config, "num_mel_bins"), frames)
    if not all(shape):
        return None
    return torch.randn(2, *shape, generator=generator)
