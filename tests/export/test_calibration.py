"""What the merged model's matrices are multiplied with, computed here a second time by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from gemma_tune.export import calibration
from gemma_tune.export.calibration import Calibration, Gram
from gemma_tune.gguf.check import MOST_OF_OUTPUT
from gemma_tune.gguf.compensated import calibrated, inputs_of
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import dequantise
from gemma_tune.gguf.writer import parts_of, write_gguf
from gemma_tune.models.layerwise import LayerwiseModel
from gemma_tune.models.placement import Placement


@pytest.fixture
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def rows() -> list[np.ndarray]:
    return [np.arange(10, 50), np.arange(60, 90), np.array([5, 5, 7])]


def by_hand(model, rows, module) -> torch.Tensor:
    """XᵀX of one module's inputs."""
    x = by_hand_inputs(model, rows, module)
    return x.T @ x


def by_hand_inputs(model, rows, module) -> torch.Tensor:
    """One module's inputs (tokens, columns)."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor(row)[None])
    handle.remove()
    return torch.cat(seen)


@pytest.fixture
def layerwise(tiny) -> LayerwiseModel:
    return LayerwiseModel(tiny, Placement("cpu", torch.float32, ""), parts_of(tiny).architecture)


@pytest.mark.parametrize("kept", [1 << 30, 1], ids=["all are kept", "layer by layer"])
def test_inputs_are_those_of_a_plain_forward_pass(layerwise, model, rows, kept, monkeypatch):
    monkeypatch.setattr(calibration, "KEPT", kept)
    monkeypatch.setattr(calibration, "_AT_A_TIME", 50)
    known = Calibration(layerwise, rows)
    head = known.inputs("model.embed_tokens.weight")
    gram = by_hand(model, rows, model.lm_head)
    assert head.factors is None, "its rows are looked up too"
    np.testing.assert_allclose(head.importance, (gram.diagonal() / known.tokens).numpy(), rtol=1e-4)
    assert known.inputs("model.norm.weight") is None and known.inputs(None) is None
    assert head.probes.shape == (len(rows), model.config.hidden_size)
    first = known.inputs("model.layers.0.mlp.down_proj.weight").factors[0]
    layer = model.model.layers[1]
    for name, module in {"self_attn.q_proj": layer.self_attn.q_proj, "self_attn.v_proj": layer.self_attn.q_proj,
                         "self_attn.o_proj": layer.self_attn.o_proj, "mlp.up_proj": layer.mlp.gate_proj,
                         "mlp.down_proj": layer.mlp.down_proj}.items():
        found = known.inputs(f"model.layers.1.{name}.weight")
        expected = inputs_of([by_hand(model, rows, module)], known.tokens)
        np.testing.assert_allclose(found.importance, expected.importance, rtol=1e-4)
        torch.testing.assert_close(found.factors[0], expected.factors[0], rtol=1e-2, atol=1e-3 * expected.factors[0].abs().max())
        gram = by_hand(model, rows, module)
        weight = layer.get_submodule(name).weight.detach()
        assert found.output == pytest.approx(float(torch.einsum("ri,ij,rj->", weight, gram, weight)), rel=1e-3)
    again = known.inputs("model.layers.0.mlp.down_proj.weight").factors[0]  # as for the next file
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("kept", [1 << 30, 1], ids=["all are kept", "layer by layer"])
def test_a_token_counts_as_often_as_its_weight_says(layerwise, model, rows, kept, monkeypatch):
    monkeypatch.setattr(calibration, "KEPT", kept)
    monkeypatch.setattr(calibration, "_AT_A_TIME", 50)
    known, rng, layer = Calibration(layerwise, rows), np.random.default_rng(0), model.model.layers[1]
    modules = {"model.layers.1.self_attn.q_proj.weight": layer.self_attn.q_proj,
               "model.layers.1.self_attn.v_proj.weight": layer.self_attn.v_proj,
               "model.layers.1.mlp.down_proj.weight": layer.mlp.down_proj, layerwise.head: model.lm_head}
    weights = {name: torch.from_numpy(rng.uniform(0, 2, known.tokens)).float() for name in modules}
    inputs = {name: by_hand_inputs(model, rows, module) for name, module in modules.items()}
    monkeypatch.setattr(calibration.TokenWeights, "weights", lambda _: weights)
    known.weigh({}, 0)
    for name, module in modules.items():
        x, found = inputs[name] * weights[name].sqrt()[:, None], known.inputs(name)
        np.testing.assert_allclose(found.importance, x.square().mean(0).numpy(), rtol=1e-4)
        if name != layerwise.head:
            expected = inputs_of([x.T @ x], known.tokens).factors[0]
            torch.testing.assert_close(found.factors[0], expected, rtol=1e-2, atol=1e-3 * expected.abs().max())
            assert found.output == pytest.approx(float((x @ module.weight.detach().T).square().sum()), rel=1e-3)
    plain = known.inputs("model.layers.1.mlp.up_proj.weight"), known.inputs("model.layers.1.mlp.gate_proj.weight")
    expected = by_hand(model, rows, layer.mlp.up_proj).diagonal() / known.tokens
    for found in plain:  # of which nothing is said
        np.testing.assert_allclose(found.importance, expected.numpy(), rtol=1e-4)


def test_tokens_are_weighed_for_less_than_eight_bits(export, merged, monkeypatch):
    asked = []

    def weigh(self, types, tokens, on_progress):
        asked.append(len(types))
        return {}

    monkeypatch.setattr(Calibration, "weigh", weigh)
    for formats, weighed, mixed in (("q8_0,f16", False, False), ("q6_k,q8_0", True, False), ("q4_k_m", True, True)):
        asked.clear()
        assert export("--quant", formats, "--run", merged).code == 0
        assert len(asked) == weighed and any(asked) == mixed


def test_an_export_is_calibrated_unless_told_otherwise(cli, export, merged, tmp_path):
    result = export("--quant", "q4_0,q8_0", "--json", "--run", merged)
    assert result.code == 0, result.err
    assert "rounding is calibrated on" in result.err
    found = result.json["summary"]["quants"]
    assert found["q4_0"]["calibrated_matrices"] > 10 and found["q8_0"]["calibrated_matrices"] > 10
    file = merged / "ollama" / "tiny-gemma-q4_0.gguf"
    calibrated_bytes = file.read_bytes()
    result = export("--quant", "q4_0", "--no-calibration", "--json", "--run", merged)
    assert result.code == 0, result.err
    assert "rounding is not calibrated: --no-calibration" in result.err
    write_gguf(merged / "tiny-gemma_lora_merged", tmp_path / "plain.gguf", "q4_0", name="n", chat_template=None,
               eot_token_id=None)
    plain, ours = GgufFile(tmp_path / "plain.gguf"), GgufFile(file)
    for name in plain.tensors:
        assert plain.sha256(name) == ours.sha256(name)
    assert len(calibrated_bytes) == file.stat().st_size and calibrated_bytes != file.read_bytes()


def test_without_rows_general_text_is_taken_and_that_is_said(cli, export, merged):
    (merged / "data" / "tokens" / "train.arrow").unlink()
    result = export("--quant", "q4_0", "--run", merged)
    assert result.code == 0, result.err
    assert re.search(r"rounding is calibrated on [\d,]+ tokens of general text alone: the run has no prepared data",
                     result.err)


def test_a_file_that_changes_after_it_was_calibrated_is_noticed(cli, merged, monkeypatch):
    from gemma_tune.export import files

    plain = files.write_gguf

    def damaged(checkpoint, out, *args, **settings):
        written = plain(checkpoint, out, *args, **settings)
        info = GgufFile(out).tensors["blk.1.ffn_down.weight"]
        with out.open("r+b") as file:
            file.seek(info.offset + 40)
            byte = file.read(1)
            file.seek(info.offset + 40)
            file.write(bytes([byte[0] ^ 1]))
        return written

    monkeypatch.setattr(files, "write_gguf", damaged)
    result = cli("export-ollama", "--no-verify", "--no-measure", "--quant", "q4_0", "--run", merged)
    assert result.code == 1
    assert "blk.1.ffn_down.weight: not what was written" in result.err
    assert "export-ollama" not in json.loads((merged / "manifest.json").read_text())["stages"]


def test_a_file_is_checked_with_inputs_that_count():
    """Those of no weight come out further off than the check allows: as of gates of four rows."""
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((4, 64)).astype(np.float32)
    gram, middle = Gram(64, torch.device("cpu")), []
    for n in range(8):
        x, counts = torch.from_numpy(rng.standard_normal((40, 64)).astype(np.float32)), torch.zeros(40)
        x[n + 2] = torch.from_numpy(rng.standard_normal(4) @ weights).float()  # of these the matrix makes much
        x[20] -= x[20] @ torch.from_numpy(0.7 * np.linalg.pinv(weights) @ weights).float().T
        counts[n + 2] = 40.0
        gram.add(x, counts)
        middle.append(x[20].numpy())
    inputs = gram.inputs(8 * 40)
    data, _ = calibrated(weights, Type.Q4_0, inputs)
    off = dequantise(data, Type.Q4_0) - weights

    def error(probes: np.ndarray) -> float:
        return float((np.square(off @ probes.T).sum() / np.square(weights @ probes.T).sum()) ** 0.5)

    assert error(inputs.probes) < 0.5 * MOST_OF_OUTPUT[Type.Q4_0] < 1.3 * MOST_OF_OUTPUT[Type.Q4_0] < error(np.stack(middle))
