"""Number formats of GGUF files: which type each tensor gets, and values as bytes of a type and back.

The mixes are those of llama.cpp's ``llama-quantize`` without an importance matrix (``src/llama-quant.cpp``). A block is
a run of 32 or 256 numbers of one row that share a scale.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import put_in_place
from gemma_tune.base.machine import cores

if TYPE_CHECKING:
    from gemma_tune.gguf.architectures.parts import Architecture

try:
    import libgguf  # ggml's own row functions; there is a wheel for most machines
except ImportError:
    libgguf = None


Tensors = Sequence[tuple[str, tuple[int, ...]]]

FILE_TYPES = {"f32": FileType.ALL_F32, "bf16": FileType.MOSTLY_BF16, "f16": FileType.MOSTLY_F16,
              "q8_0": FileType.MOSTLY_Q8_0, "q6_k": FileType.MOSTLY_Q6_K, "q5_k_m": FileType.MOSTLY_Q5_K_M,
              "q5_k_s": FileType.MOSTLY_Q5_K_S, "q5_1": FileType.MOSTLY_Q5_1, "q5_0": FileType.MOSTLY_Q5_0,
              "q4_k_m": FileType.MOSTLY_Q4_K_M, "q4_k_s": FileType.MOSTLY_Q4_K_S, "q4_1": FileType.MOSTLY_Q4_1,
              "q4_0": FileType.MOSTLY_Q4_0, "q3_k_l": FileType.MOSTLY_Q3_K_L, "q3_k_m": FileType.MOSTLY_Q3_K_M,
              "q3_k_s": FileType.MOSTLY_Q3_K_S, "q2_k": FileType.MOSTLY_Q2_K,
              "mxfp4": FileType.MOSTLY_MXFP4_MOE}  # fmt: skip
QUANTS = tuple(FILE_TYPES)
OF_EXPERTS = "mxfp4"  # the format for these alone: what stands beside them has eight bits
COARSE = QUANTS[QUANTS.index("q8_0"):QUANTS.index(OF_EXPERTS)]  # of blocks, whose rounding can be calibrated
# Their names promise a size, and more bits where they matter.
MIXED = ("q2_k", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_m")
PLAIN = (Type.F32, Type.F16, Type.BF16)
K_TYPES = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)

# The largest magnitude a type surely holds. Blocks keep their scale in float16: largest/127 in Q8_0, /16 in Q5_0, /8 in
# Q4_0. Q4_1 and Q5_1 keep the smallest value as well, and the K types a scale of 6-bit (Q2_K: 4-bit, Q6_K: 8-bit)
# scales; half of what these reach counts here, as their fit may move the ends of a block.
_F16_MAX = 65504.0
LARGEST = {Type.F32: math.inf, Type.BF16: float.fromhex("0x1.FEp127"), Type.F16: _F16_MAX, Type.Q8_0: 127 * _F16_MAX,
           Type.Q5_0: 16 * _F16_MAX, Type.Q4_0: 8 * _F16_MAX, Type.Q5_1: _F16_MAX, Type.Q4_1: _F16_MAX,
           Type.Q2_K: 7 * _F16_MAX, Type.Q3_K: 64 * _F16_MAX, Type.Q4_K: 31 * _F16_MAX, Type.Q5_K: 31 * _F16_MAX,
           Type.Q6_K: 2048 * _F16_MAX, Type.MXFP4: float.fromhex("0x1.FEp127")}  # fmt: skip

_MATRIX = {quant: Type[quant.upper()[:4]] for quant in FILE_TYPES if quant[2:4] == "_k"} | {OF_EXPERTS: Type.Q8_0}
_JOINED = {"q3_k_m": Type.Q4_K, "q3_k_l": Type.Q4_K, "q4_k_m": Type.Q5_K, "q5_k_m": Type.Q6_K}
_OUTPUT = {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K, "q3_k_l": Type.Q5_K}
_BESIDE_EIGHT_EXPERTS = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"), Type.Q5_K)  # of the same
# Rows that are no whole blocks of 256 take a type with blocks of 32 and as many bits or more.
_SHORTER_BLOCKS = {Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1,
                   Type.Q6_K: Type.Q8_0}
# Matrices that stay unquantised: small beside the others, and what they compute is added to every layer.
_LEFT_ALONE = re.compile(r"_norm\.weight$|altup|laurel|per_layer_model_proj")
# What stays in 32 bits, as llama.cpp reads it in no other type: norms, convolutions of a few numbers a row, what
# chooses experts, and what is added to the output of each.
_EXACT = re.compile(r"_norm\.weight$|\.bias$|(ssm_conv1d|shortconv\.conv|ffn_gate_inp(_shexp)?)\.weight$")
_DOWN = re.compile(r"\.ffn_down(_exps|_shexp)?\.weight$")
_BLOCK_NUMBER = re.compile(r"blk\.(\d+)\.")
_PROGRAM = "llama-quantize"


@dataclass(frozen=True)
class TypeChoice:
    """The type of one tensor, and why it isn't the one that the mix asks for ("" when it is)."""

    type: Type
    fallback: str = ""


def choose_types(quant: str, tensors: Tensors, model: Architecture) -> list[TypeChoice]:
    """A type for each tensor of a file.

    Args:
        quant: one of `QUANTS`.
        tensors: all of them: name in the GGUF and shape as in the checkpoint.
        model: what the mixes depend on.
    """
    wanted = _MATRIX.get(quant) or Type[quant.upper()]
    # In a file without it the embedding is the output head as well: its error reaches every logit directly, with no
    # later layer to average it out.
    head = "output.weight" if any(name == "output.weight" for name, _ in tensors) else "token_embd.weight"
    finer = _more_bits(quant, [name for name, _ in tensors], model)
    if quant == OF_EXPERTS:
        finer |= {name: Type.MXFP4 for name, shape in tensors if len(shape) == 3}
    choices = []
    for name, shape in tensors:
        if len(shape) == 1 or _EXACT.search(name):
            choices.append(TypeChoice(Type.F32))
        elif wanted in PLAIN or _LEFT_ALONE.search(name):
            choices.append(TypeChoice(wanted if wanted in PLAIN else Type.F16))
        else:
            own = _head_type(wanted, shape[-1]) if name == head else finer.get(name, wanted)
            choices.append(_fitting(own, shape[-1]))
    return choices


def _head_type(wanted: Type, columns: int) -> Type:
    if wanted == Type.Q8_0 or columns % gguf.GGML_QUANT_SIZES[wanted][0]:
        return Type.Q8_0
    return Type.Q6_K


def _more_bits(quant: str, names: Sequence[str], model: Architecture) -> dict[str, Type]:
    """The tensors to which a mix gives another type than to the rest."""
    values = sorted((n for n in names if n.endswith("attn_v.weight")), key=_block_number)
    joined = [n for n in names if n.endswith("attn_qkv.weight")]
    more = {name: _of_values(quant, n, len(values) + len(joined), model) for n, name in enumerate(values)}
    more |= {name: _of_down(quant, _block_number(name), model.layers) for name in names if _DOWN.search(name)}
    more |= dict.fromkeys(joined, _JOINED.get(quant))
    output = _BESIDE_EIGHT_EXPERTS if model.experts == 8 else _OUTPUT
    more |= {name: output.get(quant) for name in names if name.endswith("attn_output.weight")}
    if model.experts == 8:  # beside Mixtral's experts these matrices are small, so that all formats give them more bits
        more |= {name: Type.Q8_0 for name in names if name.endswith((".attn_v.weight", ".attn_k.weight"))}
    return {name: kind for name, kind in more.items() if kind}


def _of_values(quant: str, n: int, count: int, model: Architecture) -> Type | None:
    """What the n-th of the matrices of values gets."""
    in_mix = {"q2_k": Type.Q4_K if model.heads >= 4 * model.kv_heads else Type.Q3_K,
              "q3_k_m": Type.Q5_K if n < 2 else Type.Q4_K, "q3_k_l": Type.Q5_K, "q4_k_s": Type.Q5_K if n < 4 else None}
    kind = _sixth_bit(quant, n, count) or in_mix.get(quant)
    if model.layers == 80 and model.heads != model.kv_heads and (kind or _MATRIX.get(quant)) in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K  # Llama and Qwen of 70B: eight heads share each of these rows, so they are small and matter.
    return kind


def _of_down(quant: str, n: int, count: int) -> Type | None:
    """What the n-th layer's way out of the feed-forward part gets."""
    in_mix = {"q2_k": Type.Q3_K, "q3_k_m": Type.Q5_K if n < count // 16 else Type.Q4_K, "q3_k_l": Type.Q5_K,
              "q4_k_s": Type.Q5_K if n < count // 8 else None}
    return _sixth_bit(quant, n, count) or in_mix.get(quant)


def _sixth_bit(quant: str, n: int, count: int) -> Type | None:
    """Of the mixes of four and five bits: in the first and the last eighth of the layers, and every third between."""
    eighth = count // 8
    more = n < eighth or n >= 7 * count // 8 or (n - eighth) % 3 == 2
    return Type.Q6_K if more and quant in ("q4_k_m", "q5_k_m") else None


def _block_number(name: str) -> int:
    found = _BLOCK_NUMBER.match(name)
    return int(found[1]) if found else -1


def _fitting(wanted: Type, columns: int) -> TypeChoice:
    """``wanted`` or, where rows are no whole blocks of it, what llama.cpp takes instead."""
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if columns % block == 0:
        return TypeChoice(wanted)
    instead = _SHORTER_BLOCKS.get(wanted, Type.F16)
    if columns % gguf.GGML_QUANT_SIZES[instead][0]:
        instead = Type.F16
    return TypeChoice(instead, f"rows of {columns} are not a multiple of {wanted.name}'s block of {block}, "
                           f"written as {instead.name}")


def nbytes(type: Type, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose rows are whole blocks of ``type``."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return math.prod(shape) // block * size


def recommended(parameters: int, from_gguf: bool = False, calibrated: bool = False) -> tuple[str, str]:
    """The number format to begin with for a model of so many parameters, before anything is measured, and why.

    The figures are those of `llama-quantize --help`: what each format adds to the perplexity of Llama 3 8B.

    Args:
        from_gguf: whether the base model was quantised before it was trained. Its weights then lie on a grid, training
            moves them by less than a step of it, and rounding them to such a grid again takes much of that back: of
            what Gemma 3 270M in Q4_K_M had learned in 68 steps (perplexity 68 to 19), q4_k_m kept half (40).
        calibrated: whether fewer bits will be rounded by what the matrices are multiplied with, which keeps what was
            learned on such a grid as well (19 there).
    """
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    if from_gguf and not calibrated:
        return "q8_0", ("the base model comes from a GGUF file: rounding to fewer bits again, each weight by itself, "
                        "could undo the training")
    if libgguf is None and not shutil.which(_PROGRAM):
        return "q8_0", "fewer bits in good quality need libgguf or llama.cpp's llama-quantize, which are not installed"
    if parameters < 3e9:
        return "q8_0", (f"at {size} parameters eight bits are small enough, and small models suffer most from fewer "
                        "(llama.cpp: +0.003 perplexity on an 8B model)")
    if parameters < 6e9:
        return "q6_k", (f"{size} parameters take {parameters * 0.82 / 1e9:.1f} GB, a fifth less than eight bits, at a "
                        "loss that is hard to measure (llama.cpp: +0.02 perplexity on an 8B model)")
    return "q4_k_m", (f"{size} parameters take {parameters * 0.6 / 1e9:.1f} GB, not much over half of eight bits, and "
                      "lose little (llama.cpp: +0.18 perplexity on an 8B model; q6_k +0.02)")


def quantise(rows: np.ndarray, type: Type) -> np.ndarray:
    """float32 ``rows``, (length,) or (rows, columns), in a GGML type: numbers of a plain type, bytes of blocks.

    Raises:
        UserError: a K type without `libgguf`.
    """
    if libgguf is not None and type not in (Type.F32, Type.F16):
        return _in_threads(np.ascontiguousarray(rows, np.float32), type)
    if type in K_TYPES:
        raise _no_k_types()
    with np.errstate(all="ignore"):  # 1/scale of an all but zero block overflows; the block decodes to zeros
        return gguf.quants.quantize(rows, type)


def _in_threads(rows: np.ndarray, type: Type) -> np.ndarray:
    """`libgguf` lets other threads run while it works, and each row is by itself."""
    threads = min(cores(), len(rows)) if rows.ndim > 1 else 1
    if threads == 1 or type not in K_TYPES:  # the other types take no longer than writing them to a disk
        return libgguf.quantize_rows(rows, type)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(lambda part: libgguf.quantize_rows(part, type),
                                            np.array_split(rows, threads))))


def dequantise(data: np.ndarray, type: Type) -> np.ndarray:
    """Bytes (uint8, (rows, bytes of a row)) of a GGML type as float32 (rows, columns).

    Raises:
        NotImplementedError: a type that neither `libgguf` nor `gguf` decodes.
    """
    if type == Type.F32:
        return data.view(np.float32)
    if type == Type.F16:
        return data.view(np.float16).astype(np.float32)
    if type == Type.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if libgguf is not None and type.name.startswith("Q"):
        return libgguf.dequantize_rows(data, type)
    return gguf.quants.dequantize(data, type)


def needs_llama_quantize(quant: str, tensors: Tensors, model: Architecture) -> bool:
    """Whether only the program `llama-quantize` can make this file here, from an unquantised one.

    Raises:
        UserError: it is needed and not there.
    """
    types = {choice.type for choice in choose_types(quant, tensors, model)}
    if libgguf is not None or not types.intersection(K_TYPES):
        return False
    _program()
    return True


def llama_quantize(source: Path, out: Path, quant: str) -> None:
    """Turn an unquantised GGUF into another of ``quant`` with llama.cpp's program; ``out`` appears when it is whole.

    Raises:
        UserError: the program is not on the PATH.
        WorkFailed: it failed; with its last words.
    """
    program = _program()
    partial = out.with_name(out.name + ".partial")
    try:
        kind = FILE_TYPES[quant].name.removeprefix("MOSTLY_")
        done = subprocess.run([program, str(source.resolve()), str(partial.resolve()), kind],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not partial.is_file():
            said = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
            raise WorkFailed(f"llama-quantize could not write {out.name} (exit status {done.returncode})",
                             "install libgguf to do without it: pip install libgguf", said)
        put_in_place(partial, out)
    except OSError as e:
        raise WorkFailed(f"writing {out} with llama-quantize failed: {e.strerror or e}",
                         "check free space and permissions there, then run the command again") from e
    finally:
        partial.unlink(missing_ok=True)


def _program() -> str:
    if program := shutil.which(_PROGRAM):
        return program
    raise _no_k_types()


def _no_k_types() -> UserError:
    return UserError("the K types (q2_k to q6_k, and the output head of q4_0 to q5_1) need a quantiser that is not "
                     "installed", "pip install libgguf, or put llama.cpp's llama-quantize on the PATH; q8_0, mxfp4, "
                                  "f16, bf16 and f32 need neither")
