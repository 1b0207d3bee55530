"""Small pictures in every format that is read, and rows about them."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from support.templates import assistant, user


def drawn(number: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture that differs from those of other numbers."""
    image = Image.new("RGB", size, (37 * number % 256, 91 * number % 256, 200))
    ImageDraw.Draw(image).ellipse((4, 4, 8 + number % 12, 16), fill=(255, 255, 0))
    return image


def as_bytes(image: Image.Image, format: str = "PNG", **how: Any) -> bytes:
    """A picture as a file has it."""
    out = io.BytesIO()
    image.save(out, format, **how)
    return out.getvalue()


def turned(number: int = 0) -> bytes:
    """A JPEG that lies on its side, as telephones write them: its EXIF data says how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_bytes(drawn(number), "JPEG", exif=exif.tobytes())


def moving(format: str = "GIF") -> bytes:
    """A picture of three frames."""
    first, *others = (drawn(n) for n in range(3))
    return as_bytes(first, format, save_all=True, append_images=others)


def save(path: Path | str, content: bytes | None = None) -> bytes:
    """Write a picture, by default one that follows from its path; its bytes."""
    path = Path(path)
    content = as_bytes(drawn(sum(map(ord, path.name)))) if content is None else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def name_of(content: bytes, ending: str = ".png") -> str:
    """What a run calls a picture."""
    return hashlib.sha256(content).hexdigest() + ending


def shown(*pictures: str | bytes, question: str = "What is this?", answer: str = "A dot.") -> dict[str, Any]:
    """A conversation about pictures, which stand before the question: by their paths, or as they are."""
    parts = [{"type": "image", **({"path": one} if isinstance(one, str) else {"base64": base64.b64encode(one).decode()})}
             for one in pictures]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}, assistant(answer)]}


def prepared_row(*names: str, question: str = "What is this?", answer: str = "A dot.") -> dict[str, Any]:
    """The same as ``prepare`` writes it."""
    return {"messages": [user(question) | {"pictures": [{"at": 0, "file": f"pictures/{name}"} for name in names]},
                         assistant(answer)]}
