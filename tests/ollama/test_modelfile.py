"""Parameters, and Modelfiles: what is written comes back as Ollama reads it, or is refused."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.ollama.go_text import lossy_runes
from gemma_tune.ollama.modelfile import merged_parameters, render_modelfile, system_text
from gemma_tune.ollama.template import OllamaChat, chat_for
from support.modelfile import parse_modelfile
from support.templates import SMOLLM2, trl_template

GEMMA_CHAT = OllamaChat("{{ .Prompt }}", ("<end_of_turn>",))


def test_a_modelfile():
    text = render_modelfile(
        "gemma-q8_0.gguf",
        OllamaChat("a {{ .System }}\n", ("<end_of_turn>",)),
        parameters={"stop": ["<eos>"], "top_p": 0.95, "num_ctx": 2048, "temperature": 1, "use_mmap": True},
        system='Say "hi".\r\nAlways.',
        license_text="Gemma Terms\n",
        comment_lines=["made by gemma-tune", "two\r\nlines"],
    )
    assert text == (
        "# made by gemma-tune\n# two\n# lines\nFROM ./gemma-q8_0.gguf\n"
        'TEMPLATE """a {{ .System }}\n"""\n'
        "PARAMETER num_ctx 2048\nPARAMETER temperature 1\nPARAMETER top_p 0.95\nPARAMETER use_mmap true\n"
        'PARAMETER stop """<end_of_turn>"""\nPARAMETER stop """<eos>"""\n'
        'SYSTEM """Say "hi".\nAlways."""\nLICENSE """Gemma Terms\n"""\n'
    )
    assert parse_modelfile(text) == {
        "from": "./gemma-q8_0.gguf",
        "template": "a {{ .System }}\n",
        "parameters": {
            "num_ctx": 2048, "temperature": 1.0, "top_p": 0.95, "use_mmap": True, "stop": ["<end_of_turn>", "<eos>"],
        },
        "system": 'Say "hi".\nAlways.',
        "license": ["Gemma Terms\n"],
    }  # fmt: skip


def test_a_modelfile_with_a_renderer_and_nothing_else():
    chat = OllamaChat(None, (), renderer="gemma4", parser="gemma4")
    text = render_modelfile("a b.gguf", chat, parameters={}, system=None, license_text=None)
    assert text == "FROM ./a b.gguf\nRENDERER gemma4\nPARSER gemma4\n"


def test_the_templates_own_system_prompt_goes_into_system_unless_there_is_another():
    chat = chat_for(SMOLLM2)
    assert system_text(chat, None) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert system_text(chat, "mine") == "mine"
    assert system_text(GEMMA_CHAT, None) is None
    written = render_modelfile("m.gguf", chat, parameters={}, system=None, license_text=None)
    assert parse_modelfile(written)["system"] == chat.default_system


@pytest.mark.parametrize("name", ["gemma3", "llama3_2", "smollm2", "qwen3"])
def test_a_derived_template_comes_back_from_the_modelfile_unchanged(name):
    chat = chat_for(SMOLLM2 if name == "smollm2" else trl_template(name))
    text = render_modelfile("m.gguf", chat, parameters={}, system=None, license_text=None)
    assert parse_modelfile(text)["template"] == chat.template
    assert lossy_runes(chat.template) == []
    assert all(line == line.rstrip() or "<" in line for line in chat.template.splitlines())


PIECES = ['"', '"""', "\n", " ", "\t", "x", "#", "FROM y", "\u00a0"]


def test_texts_come_back_or_are_refused():
    """Quotes, line ends and white space in every order: never a text that comes back changed."""
    luck, came_back, refused = random.Random(7), 0, 0
    for _ in range(4000):
        text = "".join(luck.choices(PIECES, k=luck.randint(1, 9)))
        try:
            written = render_modelfile("m.gguf", GEMMA_CHAT, parameters={"stop": text}, system=text, license_text=text)
        except UserError as error:
            assert 'ends in """' in error.message
            refused += 1
            continue
        read = parse_modelfile(written)
        kept = "".join(c for c in text if c not in lossy_runes(text))
        assert (read["system"], read["license"], read["parameters"]["stop"][1:]) == (kept, [kept], [kept]), repr(text)
        came_back += 1
    assert came_back > 2000 and refused > 200


def test_three_quotes_at_a_line_end_are_refused_and_elsewhere_kept():
    for bad in ('a"""\nb', 'a"""  \nb', 'a"""\u200d\nb', '"""\n'):
        with pytest.raises(UserError, match='SYSTEM has a line that ends in """'):
            render_modelfile("m.gguf", GEMMA_CHAT, parameters={}, system=bad, license_text=None)
    for good in ('a"""b\nc', 'ends in """', '"""starts', '"'):
        text = render_modelfile("m.gguf", GEMMA_CHAT, parameters={}, system=good, license_text=None)
        assert parse_modelfile(text)["system"] == good


def test_characters_that_the_parser_drops_are_named():
    assert lossy_runes("a\u00a0b 👩\u200d👧 \u3000\n\t\r中文 é") == ["\u00a0", "\u200d", "\u3000"]
    text = render_modelfile("m.gguf", GEMMA_CHAT, parameters={}, system="a\u00a0b👩\u200d👧", license_text=None)
    assert parse_modelfile(text)["system"] == "ab👩👧"


def test_all_bad_parameters_are_reported_together():
    bad = {
        "typical_p": 0.5, "temprature": 1.0, "num_ctx": 20.5, "top_k": True, "top_p": "0.9", "min_p": float("nan"),
        "seed": None, "stop": ["a", 3], "use_mmap": 1, "num_predict": 2**63, "repeat_penalty": 1.1,
    }  # fmt: skip
    with pytest.raises(UserError) as raised:
        merged_parameters(GEMMA_CHAT, bad)
    assert [p.split(":")[0] for p in raised.value.problems] == [n for n in bad if n != "repeat_penalty"]
    assert "Ollama has no such model parameter" in raised.value.problems[0]
    assert raised.value.problems[2] == "num_ctx: 20.5 is not a whole number"
    with pytest.raises(UserError):
        render_modelfile("m.gguf", GEMMA_CHAT, parameters=bad, system=None, license_text=None)


def test_stops_are_merged_in_order_and_once():
    assert merged_parameters(GEMMA_CHAT, {"stop": "x", "seed": 1}) == {"seed": 1, "stop": ["<end_of_turn>", "x"]}
    assert merged_parameters(OllamaChat(None, ()), {}) == {}


@pytest.mark.parametrize("name", ["", "a/b.gguf", "a\\b", "c:x", " a", "a ", "a\nb", "a\u00a0b"])
def test_a_file_name_that_from_would_misread_is_refused(name):
    with pytest.raises(UserError, match="cannot stand in FROM"):
        render_modelfile(name, GEMMA_CHAT, parameters={}, system=None, license_text=None)


def test_the_grammar():
    read = parse_modelfile(
        '# comment "\n\n  from  llama3 \nSYSTEM one\nSystem "two words"\nPARAMETER num_ctx 1\nPARAMETER num_ctx 2\n'
        'PARAMETER stop "a\nb"\nMESSAGE user Why?\nMESSAGE assistant """Be\ncause"""\nREQUIRES 0.14.0\n'
        "LICENSE a\nLICENSE b\nTEMPLATE '{{ x }}' # kept"
    )
    assert read == {
        "from": "llama3", "system": "two words", "requires": "0.14.0", "license": ["a", "b"],
        "parameters": {"num_ctx": 2, "stop": ["a\nb"]}, "template": "'{{ x }}' # kept",
        "message": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Be\ncause"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("SYSTEM x", "no FROM line"),
        ("FROM x\nSISTEM y", "line 2 .* no instruction"),
        ("FROM x\nSYSTEM", "line 2 .* no instruction"),
        ("FROM x\nPARAMETER num_ctxx 1", "line 2 .* no such parameter"),
        ("FROM x\nPARAMETER stop", "line 2 .* incomplete"),
        ('FROM x\nSYSTEM """a\nb', "line 2 .* never ends"),
    ],
)
def test_a_modelfile_that_ollama_refuses(text, why):
    with pytest.raises(UserError, match=why):
        parse_modelfile(text)


def test_nothing_heavy_is_loaded():
    code = "import sys, gemma_tune.ollama.client; print({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_long_system_prompt_takes_no_time():
    start = time.process_time()
    text = render_modelfile("a.gguf", GEMMA_CHAT, parameters={}, system="Be brief.\u3000" * 10_000, license_text=None)
    assert len(text) > 100_000 and time.process_time() - start < 0.5
