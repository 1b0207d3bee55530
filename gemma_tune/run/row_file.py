"""A file of rows that a setting names, beside the run's own data: any that ``prepare`` reads, or plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.data.reading.hub_rows import PREFIX
from gemma_tune.data.reading.names import TEXT_FORMAT, How, how_of
from gemma_tune.data.reading.sources import STDIN, Row, Source, built_in, find_sources
from gemma_tune.data.usable import Showing, Usable, rows_of, sampled, usable
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.run.prepared import prepared_as
from gemma_tune.run.session import Session

_SHOWN = 20  # faults that a failure names


@dataclass(frozen=True)
class RowFile:
    """What such a file is for.

    Args:
        setting: its name, which is also that of its option.
        use, used: what the rows are for, such as ``calibrate by``, and ``calibrated by``.
        own: what the option takes for the run's own rows, as a sentence about it.
        again: which work reads the rows again when it is repeated, such as ``an export``.
    """

    setting: str
    use: str
    used: str
    own: str
    again: str

    def with_file(self, session: Session, named: str | None) -> tuple[Session, dict[str, Path]]:
        """The session with the file's name as the manifest keeps it; the files behind it, by input name.

        Args:
            named: the file that the setting names; None if it names none.

        Raises:
            UserError: there is no such file.
        """
        if named is None:
            return session, {}
        sources = self.sources(session, named, Listener())
        here = self.found(session, named)
        kept = named if named.startswith(PREFIX) else session.run.relative(Path(os.path.expanduser(here)))
        resolved = replace(session.resolved, config=replace(session.config, **{self.setting: kept}))
        return (replace(session, resolved=resolved, given=set(session.given) - {self.setting}),
                {f"{self.setting}_{n}": source.path for n, source in enumerate(sources)})

    def found(self, session: Session, named: str) -> str:
        """The file's name from here: what was given is one, what the manifest has is relative to the run."""
        return built_in(named) if self.setting in session.given else session.run.found(named)

    def sources(self, session: Session, named: str, listener: Listener) -> list[Source]:
        """The files behind a name.

        Raises:
            UserError: there are none.
        """
        name = self.found(session, named)
        try:
            self.require(name)
            texts = session.settings_of("prepare").get("format") == TEXT_FORMAT
            how = how_of(prepared_as(session))._replace(encoding=None, format=TEXT_FORMAT if texts else None)
            return find_sources([name], session.run.inputs, listener, how)
        except UserError as e:
            if self.setting in session.given:
                raise
            raise UserError(f"the rows that were {self.used} before: {e.message}",
                            f"name others with --{self.setting} FILE, or {self.own}") from e

    def require(self, name: str | None) -> None:
        """What can be known of the option without a run.

        Raises:
            UserError: there is no such file.
        """
        if name == STDIN:
            raise UserError(f"--{self.setting} reads no standard input, as {self.again} that is repeated reads the "
                            "rows again", "save them to a file, and name that")
        if name and not name.startswith(PREFIX):  # the Hub is asked when the rows are needed
            # As which a run may have been prepared, and with options that say how its rows are read.
            find_sources([name], Path(), how=How(format=TEXT_FORMAT, read_by=("--format",)))

    def rows(self, session: Session, named: str, encoder: Encoder, most: int,
             showing: Callable[[Sequence[Source]], Showing], seed: int = 0) -> tuple[list[Usable], int]:
        """The rows of the file, laid out by the run's chat template; of more than ``most`` a sample from all over it.

        Args:
            showing: gives, for the files behind the name, what is asked for the turns of rows with pictures.

        Returns:
            The rows in the order of the file, and how many it has.

        Raises:
            UserError: it cannot be read, or more of its rows cannot be used than ``prepare`` allowed.
        """
        config, listener, count = prepared_as(session), session.listener, 0
        sources = self.sources(session, named, listener)

        def read() -> Iterator[Row]:
            nonlocal count
            for source in sources:
                for row in rows_of(source, listener):
                    count += 1
                    yield row

        rows = sampled(read(), most, seed)
        good, faults = usable(rows, encoder, config, showing(sources))
        name = self.found(session, named)
        if not good or len(faults) / len(rows) > config.max_rejected:
            shown = [*faults[:_SHOWN], *([f"… and {len(faults) - _SHOWN:,} more"] if len(faults) > _SHOWN else [])]
            raise UserError(f"{len(faults):,} of {counted(len(rows), 'row')} of {name} cannot be used to {self.use}"
                            if rows else f"{name} holds no rows to {self.use}", f"correct them, or {self.own}", shown)
        if faults:
            listener.warn(f"{counted(len(faults), 'row')} of {name} cannot be used to {self.use}; the first is "
                          f"{faults[0]}")
        return good, count
