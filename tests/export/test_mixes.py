"""Mixes of types: the best for a size, and for the formats whose names promise one."""

from __future__ import annotations

import json

import pytest
from gguf import GGMLQuantizationType as Type

from gemma_tune.export import mixes
from gemma_tune.export.calibration import Calibration
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import nbytes
from support.command import QUICK
from support.models import make_model


def size_of(path) -> int:
    return sum(nbytes(info.type, info.shape) for info in GgufFile(path).tensors.values())


def test_a_file_for_a_size(export, merged):
    ends = [export("--quant", quant, "--run", merged, "--json").json["summary"]["gguf_bytes"]
            for quant in ("q4_0", "q8_0")]
    for size in (ends[1] * 2, sum(ends) // 2 + 10_000, ends[0] + 10_000):
        result = export("--size", f"{size / 1000}KB", "--run", merged, "--json")
        assert result.code == 0, result.err
        [label] = result.json["summary"]["quants"]
        assert label == f"{size / 1000}kb" and "measured to cost" in result.err
        file = merged / "ollama" / f"tiny-gemma-{label}.gguf"
        assert size - 20_000 < file.stat().st_size <= size or size > ends[1]
        assert ("eight bits everywhere, the most that is mixed" in result.err) == (size > ends[1])
        assert result.json["summary"]["quants"][label]["calibrated_matrices"] > 10
    kinds = {info.type for info in GgufFile(file).tensors.values()}
    assert len(kinds - {Type.F32}) > 1, "a mix"


def test_a_size_beside_a_format_and_in_a_rerun(cli, merged):
    again = ("export-ollama", "--no-verify", "--no-measure", "--quant", "q8_0", "--size", "1 MB", "--run", merged, "--json")
    result = cli(*again)
    assert result.code == 0, result.err
    assert [*result.json["summary"]["quants"]] == ["q8_0", "1mb"]
    assert (merged / "ollama" / "Modelfile-1mb").is_file()
    assert [figures["ollama_name"].split(":")[1] for figures in result.json["summary"]["quants"].values()] == [
        "q8_0", "1mb"]
    assert cli(*again).json["status"] == "up-to-date"
    assert cli("status", "--run", merged).code == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (("--size", "20KB"), ("no file of this model fits into ", "ask for more, such as --size ")),
    (("--size", "large"), ("size: 'large' is no size; write 250MB or 1.5GB",)),
    (("--size", "1MB", "--no-calibration"), ("measured on rows, so it does not go with no calibration",)),
])
def test_a_size_that_cannot_be(export, merged, arguments, words, monkeypatch):
    monkeypatch.delattr(Calibration, "weigh")  # told before any measuring
    result = export(*arguments, "--run", merged)
    assert result.code == 2
    assert all(word in result.err for word in words), result.err
    assert "is calibrated on" not in result.err
    assert not [*(merged / "ollama").glob("*.gguf")]


def test_a_format_that_promises_a_size_is_never_larger_or_expected_to_be_worse(export, merged, monkeypatch):
    asked = []
    plain = mixes.Mixes.of

    def of(self, label):
        quant, types = plain(self, label)
        theirs, matrices = self._llama_cpp(quant), self._matrices()
        asked.append((mixes._cost(matrices, theirs | types), mixes._cost(matrices, theirs), types))
        return quant, types

    monkeypatch.setattr(mixes.Mixes, "of", of)
    for calibrated in (True, False):
        result = export("--quant", "q4_k_m,q5_k_m", *([] if calibrated else ["--no-calibration"]), "--run", merged)
        assert result.code == 0, result.err
        sizes = {quant: size_of(merged / "ollama" / f"tiny-gemma-{quant}.gguf") for quant in ("q4_k_m", "q5_k_m")}
        if calibrated:
            ours = sizes
    assert len(asked) == 2
    assert all(ours[quant] <= sizes[quant] for quant in sizes)
    for expected, of_llama_cpp, types in asked:
        assert expected <= of_llama_cpp and (types or expected == of_llama_cpp)


def test_named_formats_keep_llama_cpps_mixes_where_the_base_was_quantised():
    mixed = mixes.Mixes(None, None, None, on_grid=True)
    assert mixed.of("q4_k_m") == ("q4_k_m", {}) and mixed.of("q5_k_m") == ("q5_k_m", {})


def test_of_a_quantised_base_a_size_takes_the_largest_format_that_fits(export, merged, monkeypatch):
    from gemma_tune.export import stage

    monkeypatch.setattr(stage, "_on_grid", lambda session: True)
    sizes = {}
    for quant in ("q8_0", "q6_k", "q4_0"):
        assert export("--quant", quant, "--run", merged, "--no-measure").code == 0
        sizes[quant] = size_of(merged / "ollama" / f"tiny-gemma-{quant}.gguf")
    # Metadata are counted generously, which is much beside a tiny model.
    result = export("--size", f"{1.4 * sizes['q8_0'] / 1000}KB", "--run", merged, "--no-measure", "--json")
    assert result.code == 0, result.err
    [quant] = result.json["summary"]["quants"]
    assert size_of(merged / "ollama" / f"tiny-gemma-{quant}.gguf") == sizes["q8_0"]


def test_the_file_says_the_format_that_is_nearest(export, merged):
    result = export("--size", "300KB", "--run", merged, "--json")
    label = next(iter(result.json["summary"]["quants"]))
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(merged / "ollama" / f"tiny-gemma-{label}.gguf")
    kind = LlamaFileType(int(reader.fields["general.file_type"].parts[-1][0]))
    assert kind.name.startswith("MOSTLY_Q")
    record = json.loads((merged / "manifest.json").read_text())["stages"]["export-ollama"]
    assert record["summary"]["quants"][label]["tensor_types"]


@pytest.fixture
def wide(cli, data, tmp_path):
    """A merged model whose rows are whole blocks of 256, as the types of less than four bits have."""
    model = make_model(tmp_path / "models" / "tiny-gemma", hidden_size=256, intermediate_size=256)
    run = tmp_path / "runs" / "tiny-gemma"
    for args in (("prepare", data, "--model", model), ("train", *QUICK), ("merge", "--no-check")):
        result = cli(*args, "--run", run)
        assert result.code == 0, result.err
    return run


def test_less_than_four_bits_only_where_the_room_asks_for_it(export, wide):
    sizes = {}
    for quant in ("q4_k_s", "q4_k_m", "q3_k_m", "q2_k"):
        result = export("--quant", quant, "--run", wide, "--no-calibration", "--json")
        assert result.code == 0, result.err
        sizes[quant] = result.json["summary"]["gguf_bytes"]
    for asked, few in ((("--quant", "q4_k_m"), False), (("--quant", "q3_k_m"), True), (("--quant", "q2_k"), True),
                       (("--size", f"{sizes['q4_k_m'] / 1000 + 20}KB"), False), (("--size", f"{sizes['q3_k_m'] / 1000 + 20}KB"), True)):
        result = export(*asked, "--calibration", "rows", "--run", wide, "--json")
        assert result.code == 0, result.err
        [(label, figures)] = result.json["summary"]["quants"].items()
        assert bool({"Q2_K", "Q3_K"} & figures["tensor_types"].keys()) == few, asked
        assert figures["bytes"] <= sizes.get(label, sizes["q4_k_m"] + 20_000)
        kinds = {info.type for info in GgufFile(wide / "ollama" / f"tiny-gemma-{label}.gguf").tensors.values()}
        assert bool({Type.Q2_K, Type.Q3_K} & kinds) == few
