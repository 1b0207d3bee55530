"""Conversations as programs to chat with export them, in shapes from which what is said has to be taken first.

Each is refused with the command that does so.
"""

from __future__ import annotations

from gemma_tune.base.shell import of_posix
from gemma_tune.data.conversations.problems import Problem, RowError
from gemma_tune.data.conversations.shaped import Fields

# From the last message of what is shown back to the first, without what is said to a tool; of a picture the parts
# stay, so that it is refused.
_SHOWN_PATH = (
    "jq -c '(arrays[], objects) | .mapping as $all | {messages: [.current_node | recurse($all[.].parent // empty) | "
    '$all[.].message // empty | select((.author.role | IN("user", "assistant")) and (.recipient // "all") == "all" and '
    '(.content.content_type | IN("text", "multimodal_text"))) | '
    '{role: .author.role, content: (.content.parts | if all(type == "string") '
    "then join(\"\") else . end)} | select(.content != \"\")] | reverse} | select(.messages != [])' conversations.json "
    "> rows.jsonl")


def chatgpt(row: Fields) -> None:
    """A conversation as ChatGPT exports it: all versions of all messages."""
    if not isinstance(row["mapping"], dict):
        return
    raise RowError([Problem("unknown_format", "`mapping` holds all versions of a conversation, as ChatGPT exports it",
                            f"take what it shows, with {of_posix(_SHOWN_PATH)}, and prepare that with --on-uneven "
                            "mend")])


_CHUNKS = ("jq -c '{contents: [.chunkedPrompt.chunks[] | select(.isThought | not) | {role, parts: [{text}]}], system: "
           ".systemInstruction.text}' FILE > rows.jsonl")


def ai_studio(row: Fields) -> None:
    """A prompt as Google's AI Studio saves it."""
    chunks = row["chunkedPrompt"].get("chunks") if isinstance(row["chunkedPrompt"], dict) else None
    if isinstance(chunks, list):
        raise RowError([Problem("unknown_format", "`chunkedPrompt` holds a conversation as Google's AI Studio saves it",
                                f"take what is said, without thoughts, with {of_posix(_CHUNKS)}, and prepare that with "
                                "--on-uneven mend")])


def takeout(row: Fields) -> None:
    """A question to Gemini as Google Takeout lists it."""
    raise RowError([Problem("unknown_format", "this is a question to Gemini as Google Takeout lists them, each by "
                                              "itself and with its answer as HTML",
                            "write `title` without its first word as `prompt`, and what `safeHtmlItem` says, as text, "
                            "as `completion`")])
