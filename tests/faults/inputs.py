"""Bad rows, bad files, bad options: exit code 2, a message, nothing made."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.lab import Lab, contents

_GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_LINE = json.dumps(_GOOD).encode() + b"\n"


def _talk(*turns: tuple[object, object], **more: object) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more}).encode()


# Files that hold nothing to learn from, or not what their name says.
FILES: dict[str, bytes] = {
    "empty.jsonl": b"", "blank.jsonl": b"\n\n \n", "no.jsonl": b"no JSON\n", "cut.jsonl": _LINE[:-20],
    "numbers.jsonl": b"1\n2\n3\n", "null.jsonl": b"null\n", "strings.jsonl": b'"a"\n"b"\n', "lists.jsonl": b"[]\n[1]\n",
    "nan.jsonl": b'{"messages": NaN}\n', "deep.jsonl": b"[" * 100_000 + b"\n", "zeros.jsonl": bytes(5000),
    "digits.jsonl": b"1" * 10_000 + b"\n", "latin.jsonl": '{"prompt": "é", "completion": "ü"}\n'.encode("latin-1"),
    "half.jsonl": b'{"messages": "\\ud800"}\n', "noise.jsonl": random.Random(1).randbytes(5000),
    "no-roles.jsonl": b'{"messages": [{"content": "a"}]}\n', "roles.jsonl": _talk((1, "a"), (None, "b")) + b"\n",
    "turns.jsonl": b'{"messages": {"role": "user"}}\n', "nobody.jsonl": b'{"messages": []}\n',
    "numbers-in.jsonl": _talk(("user", 1), ("assistant", 2.5)) + b"\n",
    "asked.jsonl": _talk(("user", "a")) + b"\n", "said.jsonl": _talk(("assistant", "b")) + b"\n",
    "empty-answer.jsonl": _talk(("user", "a"), ("assistant", "")) + b"\n", "other.jsonl": b'{"colour": "red"}\n',
    "objects.jsonl": _talk(("user", {"a": 1}), ("assistant", ["b"])) + b"\n",
    "array.json": b"[1, 2]", "object.json": b"{}", "cut.json": b'[{"messages": [', "words.csv": b"word\nred\n",
    "empty.csv": b"", "uneven.csv": b'prompt,completion\n"a,b\n', "zero.csv": b"prompt,completion\na\0,\0\n",
    "no.parquet": b"PAR1 no parquet PAR1", "empty.parquet": b"", "no.arrow": b"ARROW1\0\0no", "no.gz": b"no gzip",
    "no.jsonl.gz": b"\x1f\x8b no gzip", "cut.jsonl.gz": gzip.compress(_LINE * 50)[:40], "no.jsonl.zst": b"\x28\xb5\x2f\xfd!",
    "picture.png": b"\x89PNG\r\n\x1a\n", "code.py": b"print()\n", "nobody-knows.xyz": b"?"}

PREPARE = ("--model", "MODEL")
OPTIONS: tuple[tuple[str, ...], ...] = (
    ("prepare", "absent.jsonl", *PREPARE), ("prepare", "", *PREPARE), ("prepare", "no/*.jsonl", *PREPARE),
    ("prepare", "GOOD", *PREPARE, "--valid", "1.5"), ("prepare", "GOOD", *PREPARE, "--valid", "nan"),
    ("prepare", "GOOD", *PREPARE, "--max-length", "0"), ("prepare", "GOOD", *PREPARE, "--max-length", "a"),
    ("prepare", "GOOD", *PREPARE, "--columns", "a=b=c"), ("prepare", "GOOD", *PREPARE, "--seed", "x"),
    ("prepare", "GOOD", "--model", "absent/"), ("prepare", "GOOD", "--model", "./absent.gguf"),
    ("prepare", "GOOD", "--model", "GOOD"), ("prepare", "GOOD", "--model", "a/b/c"), ("prepare", "GOOD", "--model", "."),
    ("prepare", "GOOD", "--model", "https://example"), ("prepare", "GOOD", "--model", ""),
    ("prepare", "GOOD", *PREPARE, "--config", "absent.yaml"), ("prepare", "GOOD", *PREPARE, "--config", "GOOD"),
    ("prepare", "GOOD", *PREPARE, "--config", "bad.yaml"), ("prepare", "GOOD", *PREPARE, "--config", "unknown.yaml"),
    ("prepare", "GOOD", *PREPARE, "--run", "GOOD"), ("prepare", "GOOD", *PREPARE, "--nonsense"),
    ("train", "--run", "absent"), ("train", "--rank", "0"), ("train", "--rank", "-1"), ("train", "--rank", "many"),
    ("train", "--learning-rate", "nan"), ("train", "--learning-rate", "-1"), ("train", "--epochs", "-1"),
    ("train", "--epochs", "inf"), ("train", "--dtype", "int3"), ("train", "--target-modules", "no_such_layer"),
    ("train", "--dropout", "2"), ("train", "--batch-size", "0"), ("train", "--micro-batch", "0"),
    ("train", "--strategy", "fsdp"), ("train", "--model", "absent/"), ("train", "--max-steps", "-1"),
    ("merge", "--dtype", "fp8"), ("merge", "--adapter", "absent"), ("merge", "--adapter", "."),
    ("merge", "--adapter", "MODEL"), ("merge", "--max-shard-size", "large"), ("merge", "--base", "absent/"),
    ("merge", "--push", "no name"), ("export-ollama", "--quant", "q99"), ("export-ollama", "--name", "no name!"),
    ("export-ollama", "--parameter", "heat=1"), ("export-ollama", "--num-ctx", "0"), ("export-ollama", "--num-ctx", "-5"),
    ("export-ollama", "--converter", "absent"), ("export-ollama", "--host", "://"), ("eval", "--questions", "0"),
    ("eval", "--max-new-tokens", "0"), ("chat", "--prompt", " "), ("chat", "--prompt", "a", "--temperature", "-1"),
    ("chat", "--prompt", "a", "--top-p", "7"), ("chat", "--prompt", "a", "--max-new-tokens", "0"),
    ("chat", "--prompt", "a", "--base", "--merged"), ("status", "--run", "absent"), ("status", "--nonsense"), ("nonsense",))


def write(lab: Lab) -> Path:
    """The bad files, and a good one, in a directory."""
    folder = lab.work / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "good.jsonl").write_bytes(b"".join(_LINE.replace(b'"a"', b'"a%d"' % n) for n in range(20)))
    (folder / "bad.yaml").write_text("train: [1, {")
    (folder / "unknown.yaml").write_text("trian: {rank: 3}\n")
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(folder / "never-opened.fifo")
    return folder


def cases() -> list[Callable[[Lab], tuple[str, str | None]]]:
    """One for each bad file, alone and beside good rows, and one for each bad option."""
    files = [*FILES, "folder.jsonl", "loop.jsonl"]
    commands = [("prepare", name, *PREPARE, "--max-rejected", "0", *more) for name in files for more in ((), ("GOOD",))]
    return [lambda lab, args=args: _tried(lab, args) for args in (*commands, *OPTIONS)]


def _tried(lab: Lab, args: tuple[str, ...]) -> tuple[str, str | None]:
    folder = lab.work / "inputs"
    words = [{"MODEL": str(lab.model), "GOOD": "good.jsonl"}.get(word, word) for word in args]
    if "--run" not in words and words[0] != "nonsense":
        words += ["--run", str(lab.run)]
    # A new run for bad data; the whole one for bad options, which is to stay as it is.
    lab.restore("nothing" if words[0] == "prepare" else "whole")
    before = contents(lab.run)
    problem = lab.do(*words, cwd=folder).fault(2)
    if not problem and contents(lab.run) != before:
        problem = "an artifact was made or changed"
    return " ".join(args), problem
