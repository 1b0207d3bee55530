"""A model that computes layer by layer gives what it gives as a whole, and holds one layer's weights at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gemma_tune.gguf.writer import parts_of
from gemma_tune.models.layerwise import LayerwiseModel
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.gemmas import FAMILIES, make_family
from support.llamas import EXPERTS, MODELS, make_llama

FP32 = Placement("cpu", torch.float32, "")
ROWS = [np.array([2, 9, 30, 31, 30, 44, 12, 13, 14, 15, 16, 17, 18]), np.array([5]), np.array([2, 7, 30])]


# GPT-OSS's experts are not computed so: the export does not calibrate them.
@pytest.mark.parametrize("family", [*FAMILIES, *MODELS, *(family for family in EXPERTS if family != "gpt-oss")])
def test_layer_by_layer_is_the_whole_model(family, tmp_path):
    (make_family if family in FAMILIES else make_llama)(family, tmp_path)
    architecture = parts_of(tmp_path).architecture
    model = LayerwiseModel(tmp_path, FP32, architecture)
    whole = load_model(tmp_path, FP32)
    with torch.no_grad():
        rows = model.start(ROWS)
        for n in range(len(model.layers)):
            with model.loaded(n) as layer:
                for row in rows:
                    row.states = model.through(n, layer, row)
            assert {p.device.type for p in model.layers[n].parameters()} == {"meta"}
        for row, ids in zip(rows, ROWS, strict=True):
            expected = whole.get_decoder()(input_ids=torch.from_numpy(ids)[None]).last_hidden_state
            torch.testing.assert_close(model.finish(row), expected)
    names = {spec.source for spec in architecture.tensors}
    assert {model.embedding, model.head} <= names
    assert (model.head == model.embedding) == (whole.get_output_embeddings().weight
                                               is whole.get_input_embeddings().weight)
    for module in model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            assert model.name(module) in names


@pytest.mark.parametrize("pad", [None, 0, 45])
def test_a_token_to_pad_with_that_no_row_has(pad, tmp_path):
    """Llama 3.2's is 128004; rows of the embedding are those of the tokens that there are."""
    make_llama(next(iter(MODELS)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    model = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture)
    with torch.no_grad():
        rows = model.start(ROWS)
        torch.testing.assert_close(rows[0].states[0], load_model(tmp_path, FP32).get_input_embeddings().weight[ROWS[0]])


def test_a_head_of_its_own_whatever_the_configuration_of_the_text_part_says(tmp_path):
    make_llama("mistral small 3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, whole = LayerwiseModel(tmp_path, FP32, parts_of(tmp_path).architecture), load_model(tmp_path, FP32)
    assert model.head != model.embedding
    head = torch.from_numpy(model.stored(model.head).rows())
    assert torch.equal(head, whole.get_output_embeddings().weight) and not torch.equal(head, whole.get_input_embeddings().weight)
