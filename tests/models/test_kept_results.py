"""A layer's results are freed once the next one has used them: memory does not grow with a model's depth."""

import gc

import pytest
import torch
from torch import nn

from tests.models.clap.builders import inputs_of, pair
from tests.models.clvp.tiny import tiny_inputs, tiny_ours

DEPTH = 6


def live_bytes() -> int:
    """Count the bytes of all storages that a tensor holds now."""
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu"]
    storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages.values()}.values())


def deepen(layers: nn.ModuleList) -> nn.ModuleList:
    """Repeat the layers until there are DEPTH of them."""
    layers.extend(layers[i % 2] for i in range(DEPTH - len(layers)))
    return layers


def clvp_text():
    model = tiny_ours().text_encoder_model
    return deepen(model.layers), model, dict(input_ids=tiny_inputs()[0])


def clvp_decoder():
    model = tiny_ours().speech_decoder_model
    return deepen(model.model.decoder.layers), model, dict(input_ids=tiny_inputs()[0], use_cache=False)


def clap_text():
    model = pair("ClapTextModel")[1]
    return deepen(model.encoder.layer), model, inputs_of("ClapTextModel", pair()[1].config)


def clap_audio():
    model = pair("ClapAudioModel", shape="fused")[1]
    return model.audio_encoder.layers, model, inputs_of("ClapAudioModel", pair(shape="fused")[1].config)


@pytest.mark.parametrize("make", [clvp_text, clvp_decoder, clap_text, clap_audio])
@torch.no_grad()
def test_memory_does_not_grow_with_depth(make):
    layers, model, inputs = make()
    found = []
    for layer in dict.fromkeys(layers):
        layer.register_forward_pre_hook(lambda *_: found.append(live_bytes()))
    model(**inputs)  # arranges parameters, makes buffers
    gc.collect()
    found.clear()
    model(**inputs)
    assert len(found) == len(layers)
    assert max(found[1:]) <= found[1], found
    without = found[-1]
    found.clear()
    model(**inputs, output_hidden_states=True)
    assert found[-1] > without, "hidden states that are asked for are kept"
