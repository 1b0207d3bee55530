"""What merging and exporting take in time and memory, beside copying, PEFT's own merge and llama.cpp's converter.

Each contender runs in a process of its own on the same synthetic checkpoint: layers shaped as Gemma 3's, random bf16
numbers, several files; and an adapter of rank 16 on every linear layer. Peaks are the largest resident set that the
system recorded; `ours` also says how much of it the imports take, which differs by hundreds of MB between PyTorch's
builds. Every contender makes its files durable (fsync), and reads them from the system's cache where that
holds them. Run it from the repository:
``python tests/benchmarks/merge_export.py merge --size 4 --peft-size 1`` (GB of weights; PEFT's holds the whole model, so
it has a smaller one, on which ours is measured as well; 0 leaves it out), or
``python tests/benchmarks/merge_export.py export --size 2``, which writes GGUF files with the demo model's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, KEYS, HEAD = 2560, 10240, 8, 4, 256  # Gemma 3 4B's
RANK = 16
LINEAR = {"self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KEYS * HEAD, HIDDEN),
          "self_attn.v_proj": (KEYS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
          "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
NORMS = {**dict.fromkeys(("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                          "post_feedforward_layernorm"), (HIDDEN,)),
         "self_attn.q_norm": (HEAD,), "self_attn.k_norm": (HEAD,)}


def product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


LAYER = 2 * sum(map(product, [*LINEAR.values(), *NORMS.values()]))  # bytes


def layers_of(size: float) -> tuple[int, int]:
    """Layers and vocabulary of a checkpoint of so many GB: up to a quarter for an embedding of at most 262144 tokens."""
    vocabulary = min(262144, int(size * 1e9 / 4 / (2 * HIDDEN)) // 64 * 64)
    return max(1, round((size * 1e9 - vocabulary * 2 * HIDDEN) / LAYER)), vocabulary


def tensors_of(layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
    for n in range(layers):
        yield from ((f"model.layers.{n}.{name}.weight", shape) for name, shape in {**LINEAR, **NORMS}.items())
    yield "model.norm.weight", (HIDDEN,)


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], block: bytes) -> None:
    """A safetensors file of bf16 numbers, which are those of ``block`` again and again."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * product(shape)]}
        at += 2 * product(shape)
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, at, len(block)):
            file.write(block[:at - begin])


def make(folder: Path, size: float) -> None:
    """``base`` and ``adapter`` in a folder."""
    import torch
    from safetensors.torch import save_file

    layers, vocabulary = layers_of(size)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors_of(layers, vocabulary):
        if sum(2 * product(s) for s in shards[-1].values()) > size * 1e9 / 4:
            shards.append({})
        shards[-1][name] = shape
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for file, tensors in zip(files, shards):
        write_file(base / file, tensors, block)
    (base / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, tensors in zip(files, shards) for name in tensors}}))
    (base / "config.json").write_text(json.dumps({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": vocabulary,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS, "head_dim": HEAD, "tie_word_embeddings": True, "dtype": "bfloat16"}))
    weights = {}
    for n in range(layers):
        for name, (out, inner) in LINEAR.items():
            at = f"base_model.model.model.layers.{n}.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.02
            weights[f"{at}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted(name.split(".")[-1] for name in LINEAR), "base_model_name_or_path": str(base)}))


# --- the contenders

def copy(folder: Path, out: Path) -> None:
    """The base's files, as ``cp`` does it."""
    from gemma_tune.base.files import sync

    out.mkdir()
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)


def ours(folder: Path, out: Path) -> int:
    """The weights as `gemma-tune merge` writes them, with everything that the command imports; the imports' peak."""
    import torch

    import gemma_tune.merge.stage  # noqa: F401 - for its memory
    from gemma_tune.base.files import replacing_directory
    from gemma_tune.base.tensors import open_tensors
    from gemma_tune.lora.files import read_adapter
    from gemma_tune.merge.plan import plan_merge
    from gemma_tune.merge.weights import lay_out, write_files

    torch.ones(64, 64).bfloat16().float().addmm_(torch.ones(64, 16), torch.ones(16, 64))  # loads what computes
    imported = peak_bytes()
    plan = plan_merge(open_tensors(folder / "base"), read_adapter(folder / "adapter"))
    with replacing_directory(out) as new:
        write_files(lay_out(plan, folder / "base"), new, lambda *_: None)
    return imported


def peft(folder: Path, out: Path) -> None:
    """merge_and_unload, in the base's type, and save_pretrained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from gemma_tune.base.files import sync

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().save_pretrained(out)
    for path in out.iterdir():
        sync(path)


def export(quant: str, folder: Path, out: Path) -> None:
    """A GGUF as `gemma-tune export-ollama` writes it, read back and compared."""
    from gemma_tune.base.checkpoint import read_config
    from gemma_tune.gguf.architectures.registry import architecture_of
    from gemma_tune.gguf.check import worst_error
    from gemma_tune.gguf.writer import write_gguf

    base = folder / "base"
    write_gguf(base, out / "model.gguf", quant, name="benchmark", chat_template=None, eot_token_id=None)
    worst_error(base, out / "model.gguf", architecture_of(read_config(base), base / "config.json"))


def convert(quant: str, folder: Path, out: Path) -> None:
    """llama.cpp's converter."""
    from gemma_tune.base.listener import Listener
    from gemma_tune.gguf.converter import convert_with

    out.mkdir()
    os.environ["PYTHONPATH"] = str(CONVERTER)
    convert_with(CONVERTER, folder / "base", out / "model.gguf", quant, Listener())


CONVERTER = Path(sys.prefix) / "llama.cpp"  # where `make test` puts it
QUANTS = ("f16", "q8_0", "q4_k_m")
CONVERTED = QUANTS[:2]
CONTENDERS = {"copy": copy, "ours": ours, "peft": peft,
              **{f"ours {quant}": partial(export, quant) for quant in QUANTS},
              **{f"llama.cpp {quant}": partial(convert, quant) for quant in CONVERTED}}


def worker(name: str, folder: Path) -> None:
    """Run one contender here, and print what it took."""
    clock = time.perf_counter()
    imported = CONTENDERS[name](folder, folder / "out")
    seconds = time.perf_counter() - clock
    print(json.dumps({"seconds": seconds, "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages()),
                      "peak_bytes": peak_bytes(), **({"imported_bytes": imported} if imported else {})}))


def usages() -> list[resource.struct_rusage]:
    """Of this process, and of those that it started and that have ended."""
    return [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]


def peak_bytes() -> int:
    """The largest resident set so far."""
    return max(usage.ru_maxrss for usage in usages()) * (1 if sys.platform == "darwin" else 1024)


def measured(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "worker", name, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / "out")
    return json.loads(done.stdout.splitlines()[-1])


def add_vocabulary(base: Path) -> None:
    """The demo model's tokenizer, which is Gemma 3's."""
    from gemma_tune.base.listener import Listener
    from gemma_tune.models.source import locate

    for path in locate("demo", None, Listener()).path.glob("*token*"):
        shutil.copyfile(path, base / path.name)


def run(part: str, size: float, peft_size: float) -> dict[str, Any]:
    """Measure merging, first without PEFT on ``size`` GB, then all on ``peft_size`` GB; or exporting."""
    results = {}
    convertible = CONVERTED if CONVERTER.is_dir() else ()
    parts = {"merge": ((size, ("copy", "ours")), (peft_size, ("copy", "ours", "peft"))),
             "export": ((size, ("copy", *(f"ours {q}" for q in QUANTS), *(f"llama.cpp {q}" for q in convertible))),)}
    for gigabytes, names in parts[part]:
        if not gigabytes:
            continue
        with tempfile.TemporaryDirectory(prefix="gemma-tune-merge-") as place:
            # Apart from here: a child begins with its parent's peak.
            subprocess.run([sys.executable, __file__, "make", str(gigabytes), place], check=True)
            if part == "export":
                add_vocabulary(Path(place) / "base")
            layers, vocabulary = layers_of(gigabytes)
            largest = 2 * max(vocabulary * HIDDEN, INNER * HIDDEN)
            weights = sum(path.stat().st_size for path in (Path(place) / "base").iterdir())
            results[f"{gigabytes:g} GB"] = {"weights_bytes": weights, "largest_tensor_bytes": largest,
                                            **{name: measured(name, Path(place)) for name in names}}
    return results


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1:2] == ["make"]:
        return make(Path(sys.argv[3]), float(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("merge", "export"))
    parser.add_argument("--size", type=float, default=4.0)
    parser.add_argument("--peft-size", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.part, options.size, options.peft_size)
    if options.json:
        return print(json.dumps(results))
    for title, row in results.items():
        print(f"{title} of weights, largest tensor {row['largest_tensor_bytes'] / 1e9:.2f} GB, "
              f"{os.cpu_count()} processors")
        for name in (name for name in CONTENDERS if name in row):
            took = row[name]
            print(f"  {name:14} {took['seconds']:7.1f} s  {took['cpu_seconds']:7.1f} s CPU  "
                  f"peak {took['peak_bytes'] / 1e9:5.2f} GB")


if __name__ == "__main__":
    main()
