"""Pictures in a conversation: what stands for them among the tokens, and what the model is given of them.

A chat template writes one token where a picture stands. The model has many there, one for each part that it sees; how
many, and what stands around them, is for the family's processor to say, from the picture's size. The processors of
transformers do both at once and cannot be loaded without packages for videos and sounds, so that what they write is
written here, by family; what they compute of a picture is computed by theirs.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.words import first_line
from gemma_tune.encoding.labels import Draft, Encoded, FormatError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = "pictures"  # key of a turn, and folder beside train.jsonl
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names; some of its other readers start programs
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SIZES = 10_000  # of pictures, that are remembered


@dataclass(frozen=True)
class _Tokens:
    """Texts of a family's tokens, as far as it has them."""

    soft: str
    before: str = ""
    behind: str = ""
    end_of_row: str = ""


def _of_gemma3(tokens: _Tokens, inputs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Without the two line ends that transformers' processor writes before and behind a picture: llama.cpp, and Ollama
    with it, write none, and no template can add them there."""
    return tokens.before + tokens.soft * config.get("mm_tokens_per_image", 256) + tokens.behind


def _of_gemma4(tokens: _Tokens, inputs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return f"{tokens.before}{tokens.soft * int(inputs['num_soft_tokens_per_image'][0])}{tokens.behind}"


def _of_qwen(tokens: _Tokens, inputs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return tokens.soft * (inputs["patches"] // config["vision_config"].get("spatial_merge_size", 2) ** 2)


def _of_mistral(tokens: _Tokens, inputs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    side = config["vision_config"].get("patch_size", 14) * config.get("spatial_merge_size", 2)
    height, width = (int(length) // side for length in np.asarray(inputs["image_sizes"])[0])
    rows = [tokens.soft * width + tokens.end_of_row] * height
    return "".join(rows).removesuffix(tokens.end_of_row) + tokens.behind


def _alike(eye: Eye, size: tuple[int, int]) -> dict[str, Any]:
    return {}


def _patches(eye: Eye, size: tuple[int, int]) -> dict[str, Any]:
    """Such pictures can be large: a photograph takes seconds to be prepared."""
    width, height = size
    return {"patches": eye.processor.get_number_of_image_patches(height, width)}


def _empty_one(eye: Eye, size: tuple[int, int]) -> dict[str, Any]:
    from PIL import Image

    return eye.prepared(Image.new("RGB", size), "np")


@dataclass(frozen=True)
class _Family:
    """How a family writes a picture.

    Args:
        place: which of its tokens the chat template writes for one.
        soft, before, behind: keys of config.json with the ids of these tokens.
        written: what takes the place's place.
        marks: the input that says which tokens are a picture's.
        names: texts of tokens that config.json does not have.
        measured: what the tokens of a picture depend on, by its size in pixels.
        settings: of the processor, beside its own.
    """

    place: str
    soft: str
    written: Callable[[_Tokens, Mapping[str, Any], Mapping[str, Any]], str]
    marks: str | None
    before: str | None = None
    behind: str | None = None
    names: tuple[tuple[str, str], ...] = ()
    measured: Callable[[Eye, tuple[int, int]], dict[str, Any]] = _empty_one
    settings: tuple[tuple[str, Any], ...] = ()


# Ids where config.json leaves them out, as transformers has them.
_USUAL = {"gemma3": {"image_token_index": 262_144, "boi_token_index": 255_999, "eoi_token_index": 256_000},
          "gemma4": {"image_token_id": 258_880, "boi_token_id": 255_999, "eoi_token_id": 258_882}}
_QWEN = _Family("soft", "image_token_id", _of_qwen, "mm_token_type_ids", measured=_patches)
_FAMILIES = {
    "gemma3": _Family(
        "before", "image_token_index", _of_gemma3, "token_type_ids", "boi_token_index", "eoi_token_index",
        measured=_alike, settings=(("do_pan_and_scan", False),)),  # llama.cpp makes no pieces beside the whole
    "gemma4": _Family("soft", "image_token_id", _of_gemma4, "mm_token_type_ids", "boi_token_id", "eoi_token_id"),
    "mistral3": _Family("soft", "image_token_index", _of_mistral, None,
                        names=(("behind", "[IMG_END]"), ("end_of_row", "[IMG_BREAK]"))),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
}


class NoColours(OSError):
    """A picture of numbers without a scale."""


class Eye:
    """What a model sees pictures with, as far as texts and tokens are concerned.

    Args:
        checkpoint: the model's folder.
        tokenizer: its tokenizer.
        folder: where the pictures lie that turns name.

    Attributes:
        elsewhere: by name, pictures that lie in other places, as those that somebody shows in a chat.
        place: the token that a chat template writes for a picture.
        soft_id: the token that stands for each part of it.
        marks: the name of the model's input that tells a picture's tokens from others; None where it has none.
    """

    def __init__(self, checkpoint: Path, tokenizer: Any, folder: Path | None = None):
        self.checkpoint, self.folder, self.config = checkpoint, folder, read_config(checkpoint)
        self._family = _FAMILIES[self.config["model_type"]]
        self.soft_id, self.tokens = _tokens_of(self.config, tokenizer)
        self.place, self.marks = getattr(self.tokens, self._family.place), self._family.marks
        self.elsewhere: dict[str, Path] = {}
        self._written: dict[tuple[int, int], str] = {}

    @cached_property
    def processor(self) -> Any:
        """Transformers' image processor, in the form that needs no further package.

        Raises:
            UserError: it needs one nevertheless, or its settings cannot be read.
        """
        with keeping_garbage():
            from transformers import AutoImageProcessor
        try:
            return AutoImageProcessor.from_pretrained(self.checkpoint, backend="pil", local_files_only=True,
                                                      trust_remote_code=False)
        except Exception as e:  # noqa: BLE001 - it cannot be made of what the file says, in as many ways
            if "torchvision" in f"{e}":
                raise UserError(f"pictures for a {self.config['model_type']} need the package torchvision",
                                "pip install torchvision, in the version that fits your torch") from e
            raise UserError(f"{self.checkpoint} does not say how pictures are prepared: {first_line(e)}",
                            f"take {' or '.join(PROCESSORS)} from the original model") from e

    def inputs(self, name: str) -> dict[str, Any]:
        """What the model's ``get_image_features`` is given of a picture, as tensors: ``pixel_values`` and, by family,
        its grid or the places of its parts.

        Args:
            name: of the file in :attr:`folder`.
        """
        return self.prepared(opened(self._path(name)), "pt")

    def prepared(self, picture: Image, kind: str | None = None) -> dict[str, Any]:
        """What the processor makes of a picture, as lists or tensors ("pt")."""
        return dict(self.processor(images=[picture], return_tensors=kind, **dict(self._family.settings)))

    def written(self, size: tuple[int, int]) -> str:
        """The tokens of a picture, as text.

        Args:
            size: its width and height in pixels.
        """
        if size not in self._written:
            if len(self._written) > _SIZES:
                self._written.clear()
            self._written[size] = self._family.written(self.tokens, self._family.measured(self, size), self.config)
        return self._written[size]

    def parts(self, name: str) -> int:
        """How many tokens stand for parts of a picture."""
        return self.written(size_of(self._path(name))).count(self.tokens.soft)

    def shown(self, text: str, names: Sequence[str]) -> str:
        """A rendered text with the tokens of these pictures in their places.

        Raises:
            FormatError: it has not as many places.
        """
        return self.drawn(Draft(text, (), tuple(names))).text

    def drawn(self, draft: Draft) -> Draft:
        """A draft with the tokens of its pictures in their places.

        Raises:
            FormatError: it has not as many places.
        """
        pieces = draft.text.split(self.place)
        if len(pieces) - 1 != len(draft.pictures):
            found = len(pieces) - 1
            raise FormatError(f"the chat template writes {found or 'no'} place{'s' * (found != 1)} for "
                              f"{len(draft.pictures)} picture{'s' * (len(draft.pictures) != 1)}",
                              fix="use a model whose template takes pictures, often named …-it or …-Instruct")
        texts = [self.written(size_of(self._path(name))) for name in draft.pictures]
        ends = np.cumsum([len(piece) + len(self.place) for piece in pieces[:-1]])  # of the places, in the draft
        grown = np.cumsum([0, *(len(text) - len(self.place) for text in texts)])

        def moved(at: int) -> int:
            return at + int(grown[np.searchsorted(ends, at, side="right")])

        whole = "".join(part for pair in zip(pieces, texts) for part in pair) + pieces[-1]
        return replace(draft, text=whole, learned=tuple((moved(start), moved(end), mark)
                                                        for start, end, mark in draft.learned))

    def found(self, draft: Draft, encoded: Encoded) -> Encoded | FormatError:
        """A sequence with the ends of its pictures, from the draft of :meth:`drawn` that it was made of."""
        counts = [self.parts(name) for name in draft.pictures]
        places = np.flatnonzero(encoded.ids == self.soft_id)
        if len(places) != sum(counts):
            return FormatError(f"the text contains the chat template's own {self.tokens.soft}")
        ends = [int(places[last - 1]) + 1 for last in np.cumsum(counts)]
        return replace(encoded, pictures=tuple(zip(draft.pictures, ends)))

    def _path(self, name: str) -> Path:
        if name in self.elsewhere:
            return self.elsewhere[name]
        if self.folder is None:
            raise ValueError("no folder of pictures")
        return self.folder / name


def opened(path: Path) -> Image:
    """A picture as models are shown it: upright, in red, green and blue, of an animation the first frame.

    Raises:
        OSError: it cannot be read, or is no picture.
    """
    with _read(path) as picture:
        return in_colours(picture)


def png_of(path: Path) -> bytes:
    """A picture as models are shown it, as a file that llama.cpp and Ollama read: these turn none, and do not know each
    kind of file.

    Raises:
        OSError: as :func:`opened`.
    """
    file = io.BytesIO()
    opened(path).save(file, "PNG", compress_level=1)  # who is near takes a larger file sooner
    return file.getvalue()


def in_colours(picture: Image) -> Image:
    """A picture as it was opened, upright, in red, green and blue.

    Raises:
        NoColours: it has numbers in place of colours, as maps of heights have.
        Exception: whatever Pillow raises of a broken one.
    """
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("I", "F"):
        raise NoColours("it has numbers in place of colours, and nothing says which is white")
    if upright.mode.startswith("I;16"):  # of which Pillow takes all above 255 for white
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in pixels of the upright picture.

    Raises:
        OSError: as :func:`opened`.
    """
    found = path.stat()
    return _size_of(path, found.st_mtime_ns, found.st_size)


@lru_cache(_SIZES)
def _size_of(path: Path, changed: int, length: int) -> tuple[int, int]:
    with _read(path) as picture:
        # Of a TIFF, Pillow gives the size of the upright picture.
        turned = picture.format != "TIFF" and picture.getexif().get(0x0112) in (5, 6, 7, 8)  # Orientation
        return picture.size[::-1] if turned else picture.size


@contextlib.contextmanager
def _read(path: Path) -> Iterator[Image]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, and of faults beside what is seen
        try:
            # By its path, Pillow misreads a TIFF that is turned.
            with open(path, "rb") as file, Image.open(file, formats=READ) as picture:
                yield picture
        except MemoryError:
            raise
        except Exception as e:  # noqa: BLE001 - Pillow's readers raise whatever broken data lead them to
            if getattr(e, "filename", None):
                raise
            raise OSError(f"{path}: {first_line(e)}") from e


def _tokens_of(config: Mapping[str, Any], tokenizer: Any) -> tuple[int, _Tokens]:
    """The id of the token that stands for a part of a picture, and the texts of all; these are empty or None where the
    tokenizer does not know them."""
    family = _FAMILIES[config["model_type"]]
    ids = _USUAL.get(config["model_type"], {}) | config
    named = dict(family.names)
    for name in ("before", "behind"):
        if key := getattr(family, name):
            named[name] = tokenizer.convert_ids_to_tokens(ids[key]) if ids[key] < len(tokenizer) else ""
    soft = ids.get(family.soft, len(tokenizer))
    return soft, _Tokens(tokenizer.convert_ids_to_tokens(soft) if soft < len(tokenizer) else "", **named)


def eye_of(checkpoint: Path, tokenizer: Any, folder: Path | None = None) -> Eye | None:
    """The eye of a checkpoint; None where it takes text alone, or its pictures are not known here (:func:`blindness`).

    Raises:
        UserError: config.json cannot be read.
    """
    return None if blindness(checkpoint, tokenizer) else Eye(checkpoint, tokenizer, folder)


def blindness(checkpoint: Path, tokenizer: Any) -> str:
    """Why nothing can be learned from pictures with a model, in words that follow "because"; empty if it can.

    Raises:
        UserError: config.json cannot be read.
    """
    config = read_config(checkpoint)
    if not isinstance(config.get("vision_config"), dict):
        return "the model takes text alone"
    if config.get("model_type") not in _FAMILIES:
        return f"pictures are not learned with models of its kind ({config.get('model_type')})"
    if not any((checkpoint / name).exists() for name in PROCESSORS):
        return f"its folder has no {' or '.join(PROCESSORS)}, which says how pictures are prepared"
    if not _tokens_of(config, tokenizer)[1].soft:
        return "its tokenizer has no token for pictures"
    return ""


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the files of all pictures of a prepared conversation, in order."""
    return [Path(picture["file"]).name for message in messages if PICTURES in message for picture in message[PICTURES]]


def with_parts(turn: Mapping[str, Any], *told: str) -> Mapping[str, Any]:
    """A turn as templates take it that show pictures: its content as a list of texts and places; one without any as it
    is.

    Args:
        told: keys of pictures that their places have as well.
    """
    if not turn.get(PICTURES):
        return turn
    before, *others = texts_around(turn)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    for picture, text in zip(turn[PICTURES], others, strict=True):
        parts.append({"type": "image"} | {key: picture[key] for key in told})
        if text:
            parts.append({"type": "text", "text": text})
    return {key: value for key, value in turn.items() if key != PICTURES} | {"content": parts}


def texts_around(turn: Mapping[str, Any]) -> list[str]:
    """What a turn says before its first picture, between two of them and behind the last."""
    places = [picture["at"] for picture in turn.get(PICTURES, ())]
    return [turn["content"][start:end] for start, end in zip([0, *places], [*places, None])]
