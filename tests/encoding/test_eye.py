"""Pictures among tokens: as transformers' processors write them, and each with its end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import Gemma3Processor, Gemma4Processor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from gemma_tune.encoding import eye as eyes
from gemma_tune.encoding.eye import blindness, eye_of, opened, size_of, texts_around, with_parts
from gemma_tune.encoding.labels import FormatError
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.encoding.tokenizer import load_format, load_tokenizer
from support.models import make_model
from support.towers import make_seer

WORDS = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
SHOWN = "<start_of_image>" + 4 * "<image_soft_token>" + "<end_of_image>"


@pytest.fixture
def pictures(tmp_path) -> Path:
    for n, size in enumerate(((60, 40), (30, 90))):
        Image.new("RGB", size, (200, 40 * n, 10)).save(tmp_path / f"{n}.png")
    return tmp_path


@pytest.fixture
def chat(seer, pictures):
    chat = load_format(seer, "gemma3")
    chat.eye.folder = pictures
    return chat


def user(text: str, *places: tuple[int, int]) -> dict:
    """A question with pictures, each as (character, number of its file)."""
    return {"role": "user", "content": text, "pictures": [{"at": at, "file": f"pictures/{n}.png"} for at, n in places]}


ANSWER = {"role": "assistant", "content": "red"}


def test_a_picture_stands_where_the_turn_has_it(chat):
    turns = [user("Compare with , please", (8, 0), (13, 1)), ANSWER, {"role": "user", "content": "Sure?"}, ANSWER]
    [found] = chat.encode(turns)
    text = chat.tokenizer.decode(found.ids)
    assert text == ("<bos>" + WORDS.format(f"Compare{SHOWN}with{SHOWN}, please") + "red<end_of_turn>\n"
                    + WORDS.format("Sure?") + "red<end_of_turn>")
    learned = [chat.tokenizer.decode(found.ids[a:b]) for a, b in found.spans]
    assert learned == ["red<end_of_turn>"] * 2
    soft = np.flatnonzero(found.ids == chat.eye.soft_id)
    assert found.pictures == (("0.png", soft[3] + 1), ("1.png", soft[7] + 1))
    assert chat.prompt_ids(turns[:1]) == found.ids[:found.spans[0, 0]].tolist()


def test_the_system_text_goes_before_it(chat):
    [found] = chat.encode([{"role": "system", "content": "Be brief."}, user("What?", (0, 1)), ANSWER])
    assert WORDS.format(f"Be brief.\n\n{SHOWN}What?") in chat.tokenizer.decode(found.ids) and found.pictures[0][0] == "1.png"


def test_what_is_cut_off_takes_its_pictures_along(chat):
    turns = [user("a", (1, 0)), ANSWER, user("b", (1, 1)), ANSWER]
    [whole] = chat.encode(turns)
    [[first]] = [o.kept for o in Encoder(chat, len(whole.ids) - 6, "truncate").encode([{"messages": turns}])]
    assert [name for name, _ in first.pictures] == ["0.png"] and len(whole.pictures) == 2
    [outcome] = Encoder(chat, len(first.ids) + 8, "split").encode([{"messages": turns}])
    assert [[name for name, _ in s.pictures] for s in outcome.kept] == [["0.png"], ["1.png"]]


@pytest.mark.parametrize(("template", "says"), [
    ("{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}", "writes no places for 1 picture"),
    ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text if p.text else '' if p is string else '<start_of_image>' * 2 }}{% endfor %}{% endif %}<end_of_turn>{% endfor %}",
     "writes 2 places for 1 picture"),
])
def test_a_template_that_does_not_show_it(seer, pictures, tmp_path, template, says):
    (tmp_path / "t.jinja").write_text(template)
    chat = load_format(seer, "gemma3", template=tmp_path / "t.jinja")
    chat.eye.folder = pictures
    [found] = chat.encode_many([([user("a", (0, 0)), ANSWER], None)])
    assert isinstance(found, FormatError) and says in str(found)


def test_a_model_that_does_not_see(tmp_path):
    chat = load_format(make_model(tmp_path / "blind"), "gemma3_text")
    assert chat.eye is None
    [found] = chat.encode_many([([user("a", (0, 0)), ANSWER], None)])
    assert isinstance(found, FormatError) and "takes text alone" in str(found)
    with pytest.raises(FormatError, match="takes text alone"):
        chat.prompt_ids([user("a", (0, 0))])


def test_why_nothing_is_learned_from_pictures(seer, tmp_path):
    import shutil

    tokenizer, folder = load_tokenizer(seer), shutil.copytree(seer, tmp_path / "copy")
    assert blindness(folder, tokenizer) == ""
    config = json.loads((folder / "config.json").read_text())
    for changes, why in (({"image_token_index": 10 ** 6}, "no token for pictures"), ({"model_type": "gemma3n"}, "kind (gemma3n)"),
                         ({"vision_config": None}, "text alone")):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert why in blindness(folder, tokenizer) and eye_of(folder, tokenizer) is None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in blindness(folder, tokenizer)


def _theirs(kind, own: dict, outputs: dict) -> str:
    """What a processor of transformers writes, of which a part needs packages that are not here."""
    return kind.replace_image_token(SimpleNamespace(**own), outputs, 0)


def test_as_the_processors_write_them():
    tokens = eyes._Tokens("<s>", "<b>", "<e>")
    # But for the line ends, which llama.cpp does not write.
    whole = "\n\n<b>" + "<s>" * 4 + "<e>\n\n"
    assert eyes._of_gemma3(tokens, {}, {"mm_tokens_per_image": 4}) == _theirs(
        Gemma3Processor, {"full_image_sequence": whole}, {"num_crops": [0]}).strip()
    outputs = {"num_soft_tokens_per_image": [7]}
    assert eyes._of_gemma4(tokens, outputs, {}) == _theirs(
        Gemma4Processor, {"boi_token": "<b>", "eoi_token": "<e>", "image_token": "<s>"}, outputs)
    outputs = {"image_grid_thw": np.array([[1, 6, 8]])}
    assert eyes._of_qwen(tokens, {"patches": 48}, {"vision_config": {"spatial_merge_size": 2}}) == _theirs(
        Qwen3VLProcessor, {"image_token": "<s>", "image_processor": SimpleNamespace(merge_size=2)}, outputs)
    # PixtralProcessor cannot be imported without torchvision: the rows are those of its source.
    mistral = eyes._Tokens("<s>", behind="<e>", end_of_row="<r>")
    assert eyes._of_mistral(mistral, {"image_sizes": [[56, 84]]}, {"vision_config": {"patch_size": 14}}) == (
        "<s><s><s><r><s><s><s><e>")


def test_qwens_tokens_are_counted_without_preparing_the_picture(tmp_path, monkeypatch):
    """Which takes five seconds for one of twelve megapixels, and is done once for each size."""
    make_seer("qwen3.5", tmp_path / "seer")
    eye = eye_of(tmp_path / "seer", load_tokenizer(tmp_path / "seer"))
    merged = eye.config["vision_config"]["spatial_merge_size"] ** 2
    sizes = [(8, 8), (40, 24), (33, 90), (500, 31), (301, 299)]
    parts = [int(np.prod(eye.prepared(Image.new("RGB", size), "np")["image_grid_thw"][0])) // merged for size in sizes]
    monkeypatch.delattr(type(eye), "prepared")
    assert [eye.written(size).count(eye.tokens.soft) for size in sizes] == parts and len({*parts}) > 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turned", [None, 0, 1, 3, 5, 6, 7, 8, 9, 255])
def test_a_picture_is_upright_and_has_three_colours(tmp_path, format, turned):
    path, exif = tmp_path / "turned", Image.Exif()
    if turned is not None:
        exif[0x0112] = turned
    lying = np.zeros((10, 30), np.uint8)
    lying[:, :15] = 255
    Image.fromarray(lying).save(path, format, exif=exif)
    upright = (10, 30) if turned in (5, 6, 7, 8) else (30, 10)
    assert size_of(path) == upright == opened(path).size and opened(path).mode == "RGB"
    white = np.asarray(opened(path)).mean(2) > 128
    first = white[:14] if turned in (5, 6, 7, 8) else white[:, :14]
    assert first.all() == first.any() == (turned not in (3, 7, 8))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_fine_shades_of_grey_stay_apart(tmp_path, format):
    """As llama.cpp and Ollama read them: of 16 bits the upper 8."""
    fine = (np.arange(256, dtype=np.uint16) << 8 | 0x80).reshape(16, 16)
    Image.fromarray(fine).save(tmp_path / "grey", format)
    shown = np.asarray(opened(tmp_path / "grey"))
    assert (shown == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all() and shown.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_are_no_colours(tmp_path, kind):
    Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / "heights", "TIFF")
    with pytest.raises(OSError, match="nothing says which is white"):
        opened(tmp_path / "heights")


def test_texts_and_places():
    turn = user("ab", (0, 0), (1, 1), (2, 0))
    assert texts_around(turn) == ["", "a", "b", ""] and texts_around(ANSWER) == ["red"]
    picture = {"type": "image"}
    assert with_parts(turn) == {"role": "user", "content": [
        picture, {"type": "text", "text": "a"}, picture, {"type": "text", "text": "b"}, picture]}


@pytest.mark.parametrize("read", [opened, size_of])
def test_a_damaged_picture_is_an_error_of_reading_whatever_its_reader_raises(tmp_path, read):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:18] + b"\0\0\1\0" * 2 + path.read_bytes()[26:])  # 65,536 x 65,536 pixels
    with pytest.raises(OSError, match="a.bmp: Image size"):
        read(path)


def test_a_file_whose_content_changes_is_another_picture(tmp_path):
    """As one that a program writes again and again, and asks about each time."""
    path = tmp_path / "frame.png"
    for size in ((30, 20), (64, 80)):
        Image.new("RGB", size).save(path)
        assert size_of(path) == size


def test_what_pillow_warns_of_is_shown_to_nobody(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of which the double is refused
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([1, 2, 3, 200, 100, 0])
    palette.save(tmp_path / "large.png", transparency=b"\0\x80")
    assert opened(tmp_path / "large.png").getpixel((0, 0)) == (200, 100, 0) and size_of(tmp_path / "large.png") == (40, 40)
    assert not recwarn.list


def test_no_program_is_started_for_what_only_looks_like_a_picture(tmp_path):
    """Pillow would have Ghostscript run a PostScript file, whatever its name."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert Image.open(path).format == "EPS"
    for reads in (opened, size_of):
        with pytest.raises(OSError, match="cannot identify"):
            reads(path)
