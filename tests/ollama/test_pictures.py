"""A model that sees, in Ollama: two files become two layers, pictures are asked about, and what a server lacks is told."""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from pathlib import Path

import gguf
import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.pictures import BLUE, QUESTION, RED, square
from gemma_tune.ollama.capabilities import tell_capabilities
from gemma_tune.ollama.client import Refused, Server, create_model, generate_check, picture_answer
from gemma_tune.ollama.modelfile import render_modelfile
from gemma_tune.ollama.template import OllamaChat
from support.gguf import write
from support.listener import Said
from support.modelfile import parse_modelfile
from support.ollama import ANSWER, LoopbackOllama

CHAT = OllamaChat("{{ range .Messages }}{{ .Content }}{{ end }}", ("<end_of_turn>",), family="gemma")


def written(tmp_path: Path, blocks: int = 1) -> tuple[Path, Path]:
    """A text model and a projector, by their metadata alone."""
    model, projector = tmp_path / "m-q8_0.gguf", tmp_path / "mmproj-m-f16.gguf"
    for path, arch, kind, keys in ((model, "gemma3", gguf.GGUFType.MODEL, {"gemma3.block_count": 2}),
                                   (projector, "clip", gguf.GGUFType.MMPROJ, {"clip.vision.block_count": blocks})):
        writer = gguf.GGUFWriter(path, arch)
        writer.add_type(kind)
        for key, value in keys.items():
            writer.add_uint32(key, value)
        writer.add_bool("clip.has_vision_encoder", arch == "clip")
        write(writer)
    return model, projector


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return written(tmp_path)


def made(double: LoopbackOllama, model: Path, projector: Path | None, **more) -> Server:
    server = Server(double.url, double.version)
    create_model(server, "m", model, CHAT, {}, projector=projector, **more)
    return server


@pytest.mark.parametrize("generation", ["0.24", "0.33", "0.34.1"])
def test_both_files_become_layers_and_a_picture_is_answered(files, generation):
    digests = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}
    said = Said()
    with LoopbackOllama(generation) as double:
        server = made(double, *files)
        assert double.models["m:latest"]["files"] == digests
        assert double.layers["m:latest"] == dict(zip(("model", "projector"), digests.values(), strict=True))
        assert double.paths() == [*["HEAD /api/blobs/sha256:…", "POST /api/blobs/sha256:…"] * 2, "POST /api/create"]
        tell_capabilities(server, "m", CHAT, said, sees=True)
        assert picture_answer(server, "m", square(RED), QUESTION, 5, chat=CHAT, num_predict=9) == ANSWER
        [turn] = double.requests[-1].body["messages"]
        assert turn["content"] == QUESTION and base64.b64decode(turn["images"][0]) == square(RED)
        assert double.requests[-1].body["options"]["num_predict"] == 9
        made(double, *files)
        assert double.paths()[-3:] == ["HEAD /api/blobs/sha256:…"] * 2 + ["POST /api/create"], "nothing is sent again"
    assert not said.warnings


def test_a_projector_that_changed_since_is_not_uploaded(files):
    model, projector = files
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    projector.write_bytes(projector.read_bytes() + b"x")
    with LoopbackOllama() as double, pytest.raises(UserError, match="mmproj-m-f16.gguf is damaged") as raised:
        made(double, model, projector, sha256=digests, again="gemma-tune again")
    assert raised.value.hint == "make it again: gemma-tune again" and double.requests == []


def test_what_servers_cannot_do_with_pictures(files):
    model, projector = files
    with LoopbackOllama() as double:  # without a projector
        server = made(double, model, None)
        with pytest.raises(Refused, match="show m a picture: this model is missing data required for image input"):
            picture_answer(server, "m", square(RED), QUESTION, 5)
    with LoopbackOllama("0.24", ["no-split-vision"]) as double:  # no answer to anything
        server = made(double, *files)
        with pytest.raises(Refused, match="unable to load model"):
            generate_check(server, "m", [{"role": "user", "content": "Hi"}], 5)
        made(double, model, None)
        assert generate_check(server, "m", [{"role": "user", "content": "Hi"}], 5)["answer"] == ANSWER
    said = Said()
    with LoopbackOllama("0.24", ["no-vision-listed"]) as double:
        tell_capabilities(made(double, *files), "m", CHAT, said, sees=True)
        tell_capabilities(made(double, model, None), "m", CHAT, said)
    [warning] = said.warnings
    assert warning.startswith("Ollama 0.24.0 does not list vision for m, though it got what pictures are read by")


def test_an_older_server_takes_an_eye_without_layers_for_a_model(tmp_path):
    """That of Gemma 4 12B has none; Ollama's pull request #16472 looks at more."""
    files = written(tmp_path, blocks=0)
    with LoopbackOllama("0.33") as double:
        server = made(double, *files)
        assert double.layers["m:latest"].keys() == {"model"}
        with pytest.raises(Refused, match="unable to load model"):
            generate_check(server, "m", [{"role": "user", "content": "Hi"}], 5)
    with LoopbackOllama("0.34.1") as double:
        assert picture_answer(made(double, *files), "m", square(RED), QUESTION, 5) == ANSWER


def test_a_modelfile_names_both_files():
    text = render_modelfile("m.gguf", CHAT, parameters={}, system=None, license_text=None, projector_name="mmproj-m-f16.gguf")
    assert text.startswith("FROM ./m.gguf\nFROM ./mmproj-m-f16.gguf\nTEMPLATE ")
    read = parse_modelfile(text)
    assert read["from"] == "./m.gguf" and read["beside"] == ["./mmproj-m-f16.gguf"]
    with pytest.raises(UserError, match="'a/b.gguf' cannot stand in FROM"):
        render_modelfile("m.gguf", CHAT, parameters={}, system=None, license_text=None, projector_name="a/b.gguf")


def test_pictures_are_png_files():
    content = square(BLUE, side=3)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, parts = 8, {}
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        parts[kind], check = content[at + 8:at + 8 + length], content[at + 8 + length:at + 12 + length]
        assert zlib.crc32(kind + parts[kind]) == int.from_bytes(check)
        at += 12 + length
    assert list(parts) == [b"IHDR", b"IDAT", b"IEND"] and struct.unpack(">II", parts[b"IHDR"][:8]) == (3, 3)
    assert zlib.decompress(parts[b"IDAT"]) == (b"\0" + bytes(BLUE) * 3) * 3
