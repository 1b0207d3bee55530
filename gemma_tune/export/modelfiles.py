"""The Modelfiles of an export: what Ollama is told of each file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemma_tune.base.files import fresh_path
from gemma_tune.export.deploy import model_names
from gemma_tune.export.files import ExportSource
from gemma_tune.ollama.modelfile import render_modelfile
from gemma_tune.run.earlier_exports import TOLD
from gemma_tune.run.session import Session


@dataclass(frozen=True)
class Told:
    """What stands beside the GGUF of a number format.

    Each format has a Modelfile of its own name, which a later export of other formats leaves in place; what is called
    just Modelfile is that of the format to take.

    Args:
        name: the model's in Ollama.
        quant: the number format.
        folder: where the Modelfiles are.
        content: of the Modelfile.
        digest: of what it says beside names, which is the same of all formats.
    """

    name: str
    quant: str
    folder: Path
    content: bytes
    digest: str

    @property
    def figures(self) -> dict[str, str]:
        """What the manifest has of it among the format's figures."""
        return {"ollama_name": self.name, TOLD: self.digest}

    @property
    def paths(self) -> dict[str, Path]:
        """Where it can be written, by the names in the manifest."""
        return {"modelfile": self.folder / "Modelfile",
                f"modelfile_{self.quant}": self.folder / f"Modelfile-{self.quant}"}

    def write(self, outputs: dict[str, Path], fresh: dict[Path, Path], to_take: bool) -> None:
        """Write the successors of the files, and add them to what a stage made and where it lies."""
        for key, path in self.paths.items():
            if to_take or key != "modelfile":
                outputs[key], fresh[path] = path, fresh_path(path)
                fresh[path].write_bytes(self.content)


def modelfiles_of(session: Session, source: ExportSource, quants: tuple[str, ...]) -> dict[str, Told]:
    """By number format.

    Raises:
        UserError: a Modelfile cannot hold what it is to say; so this comes before the long work.
    """
    target, projector = source.target, session.run.projector.name if source.projector else None
    render = partial(render_modelfile, chat=target.chat, parameters=target.parameters, system=target.system,
                     license_text=target.license)
    digest = hashlib.sha256(render("any.gguf", projector_name=projector and "mmproj.gguf").encode()).hexdigest()
    found = {}
    for quant, name in model_names(target.name, quants).items():
        text = render(f"{session.run.model_name}-{quant}.gguf", projector_name=projector, comment_lines=[
            f"{session.model.id}, fine-tuned with gemma-tune", f"ollama create {name} -f Modelfile-{quant}"])
        found[quant] = Told(name, quant, session.run.ollama, text.encode(), digest)
    return found
