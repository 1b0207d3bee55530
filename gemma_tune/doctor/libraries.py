"""Python and the libraries: are they there, new enough, and those that were tested together."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from gemma_tune.base.machine import cores
from gemma_tune.doctor.finding import BROKEN, LOOK, OK, Finding

PACKAGE = "gemma-tune"
# What decides what a stage computes, in the versions that were tested together; a test compares them with
# .ci/constraints.txt, which does not come with the package.
TESTED = {
    "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2", "datasets": "5.2.0",
    "accelerate": "1.15.0", "tokenizers": "0.23.3", "bitsandbytes": "0.50.2", "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0", "gguf": "0.19.0", "Jinja2": "3.1.6", "numpy": "2.4.6", "pyarrow": "26.0.1",
}


def python() -> Iterator[Finding]:
    """The interpreter and the machine."""
    yield Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}, "
                                f"{cores()} cores for this process")


def libraries() -> Iterator[Finding]:
    """Installed versions beside the least that gemma-tune asks for and the ones that were tested."""
    wanted = _required()
    missing, old = [], []
    for name, requirement in wanted.items():
        version = _version(name)
        if version is None:
            missing.append(name)
        elif not requirement.specifier.contains(version, prereleases=True):
            old.append((name, version, requirement))
    names = [f"{name} {_version(name)}, at least {str(requirement.specifier).removeprefix('>=')} is needed"
             for name, _, requirement in old]
    for state, what, found, packages in (
            (BROKEN, "not installed", ", ".join(missing), [str(wanted[name]).split(";")[0] for name in missing]),
            (BROKEN, "too old", "; ".join(names), [f"{name}{requirement.specifier}" for name, _, requirement in old])):
        if found:
            yield Finding("libraries", state, f"{what}: {found}", _install(packages))
    other = {name: version for name, tested in TESTED.items()
             if (version := _version(name)) is not None and version.split("+")[0] != tested}
    if other:
        listed = ", ".join(f"{name} {version} ({TESTED[name]})" for name, version in other.items())
        again = _install([f"{name}=={TESTED[name]}" for name in other])
        yield Finding("libraries", LOOK, f"others than the tested ones, in brackets: {listed}",
                      f"nothing, as long as it works; else {again}")
    elif not missing and not old:
        main = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "trl"))
        yield Finding("libraries", OK, f"the versions that were tested together: {main}")


def _required() -> dict[str, Requirement]:
    """What the installed package asks for on this system; without its metadata (run from a checkout) the tested ones.
    """
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        texts = list(TESTED)
    requirements = [Requirement(text) for text in texts]
    return {one.name: one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _install(packages: list[str]) -> str:
    quoted = " ".join(f"'{package}'" if set(package) & set("<>=~!") else package for package in packages)
    program = "pip" if sys.prefix != sys.base_prefix else f"{sys.executable} -m pip"
    return f"{program} install {quoted}"
