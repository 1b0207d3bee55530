"""The pictures of rows that ``eval --data`` names: looked for as ``prepare`` looks for those of the run, and kept in
``evaluated/``, as far as the report shows them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path
from gemma_tune.base.words import counted
from gemma_tune.config.stages import EvalConfig
from gemma_tune.data.conversations.kept_pictures import NoticedPictures, not_looked_at
from gemma_tune.data.conversations.picture_files import require_folder
from gemma_tune.data.conversations.unread import Unread
from gemma_tune.data.reading.rows import Row, Source
from gemma_tune.data.usable import Showing, Turns
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.run.pictures import blind, keep_tried, kept_in, others_now
from gemma_tune.run.session import Session


def require_use(config: EvalConfig) -> None:
    """What can be known of ``--pictures`` before a run is looked at.

    Raises:
        UserError: there is no such folder, or no rows are named whose pictures lie there.
    """
    if config.pictures and config.data_file is None:
        raise UserError("--pictures is for rows of a file, and the pictures of the validation rows are in the run",
                        "name the rows with --data FILE, or leave --pictures out")
    require_folder(config.pictures)


def with_folder(session: Session) -> Session:
    """The session with the folder of ``--pictures`` as the manifest keeps it.

    Raises:
        UserError: it is not there, or no rows are named whose pictures lie there.
    """
    named, kept = session.config.pictures, None
    if "pictures" in session.given:
        require_use(session.config)
    elif session.config.data_file and named:
        named = session.run.found(named)
        if "data" in session.given and not os.path.isdir(named):
            session.listener.note(f"the folder of the pictures, {named}, is gone: it is not looked into any more")
            named = None
        require_folder(named)
    if session.config.data_file and named:
        kept = session.run.relative(Path(os.path.expanduser(named)))
    resolved = replace(session.resolved, config=replace(session.config, pictures=kept))
    return replace(session, resolved=resolved, given=set(session.given) - {"pictures"})


def other_pictures(session: Session) -> str | None:
    """What became of the files since, in which the rows' pictures were looked for; None where all is the same, or other
    rows are measured now."""
    if session.settings_of("eval").get("data") != session.config.data:
        return None
    return others_now(session.run, session.run.evaluated / session.run.picture_files.name)


@contextlib.contextmanager
def shown_in_file(session: Session, chat: ChatFormat) -> Iterator[Callable[[Sequence[Source]], Showing]]:
    """What takes the pictures of a file's rows into the successor of ``evaluated/``, where the model has an eye, and
    lets it find them there; where they were looked for is kept there as well."""
    folder, noticed = fresh_path(session.run.evaluated), NoticedPictures()

    def showing(sources: Sequence[Source]) -> Showing:
        named = session.config.pictures or session.settings_of("prepare").get("pictures")
        pictures, why = kept_in(folder / PICTURES, session, chat, sources, named), blind(session, chat)

        def shown(row: Row, turns: Turns) -> Turns:
            if pictures is None:
                raise not_looked_at(why)
            return pictures.taken(row, turns, noticed)

        return shown

    try:
        yield showing
    except UserError as e:
        if elsewhere := noticed.elsewhere():
            e.reword(f"{e.message}: {elsewhere[0]}", elsewhere[1])
        raise
    _tell_where(session, noticed)
    keep_tried(session.run, folder / session.run.picture_files.name, noticed.tried)


def _tell_where(session: Session, noticed: NoticedPictures) -> None:
    """A folder that was named for the run's data may have other pictures of the same names."""
    if session.config.pictures or not (told := session.settings_of("prepare").get("pictures")):
        return
    folder = Path(session.run.found(told))
    if found := sum(tried == folder and stamp is not None for (tried, _), stamp in noticed.tried.items()):
        session.listener.note(f"{counted(found, 'picture is', 'pictures are')} of {folder}, as `prepare` was told; "
                              "--pictures DIR looks into another folder first")


def tell_of_unread(session: Session, unread: Sequence[Sequence[Unread]]) -> None:
    """Warn of rows that hold a picture where nobody reads any, and are measured without it.

    Args:
        unread: what is not read of each row.
    """
    noticed = NoticedPictures()
    for found in unread:
        noticed.pass_over(found)
    if noticed.unread:
        listed = counted(noticed.unread, "row holds", "rows hold")
        session.listener.warn(f"{listed} a picture in `{noticed.first_unread}`, which is not read, and "
                              f"{'is' if noticed.unread == 1 else 'are'} measured without it: call it `image`")
