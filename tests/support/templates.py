"""What the tests of chat templates share: TRL's templates, small tokenizers of both real shapes, and turns."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from support.gguf import CORPUS, train_sentencepiece

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_3_1 = (*LLAMA, "<|eom_id|>", "<|python_tag|>")
GEMMA_4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>", "<|tool_call>",
           "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
# Qwen adds these as tokens, but not as special ones.
QWEN_WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# SmolLM2's own template: a default system prompt, no BOS, nothing is trimmed.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# GLM-4-0414's: what ends an answer is the role that comes next.
GLM = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>")
GLM4 = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
{% for tool in tools %}
    {%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}
{%- endif -%}

{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- endif %}
{%- endfor %}

{%- for message in messages if message.role != 'system' %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
    {%- set visible = content.split('</think>')[-1].strip() %}
    {%- set meta = message.get("metadata", "") %}

    {%- if role == 'user' %}
<|user|>
{{ visible }}
    {%- elif role == 'assistant' and not meta %}
<|assistant|>
{{ visible }}
    {%- elif role == 'assistant' and meta %}
<|assistant|>{{ meta }}
{{ visible }}
    {%- elif role == 'observation' %}
<|observation|>
{{ visible }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

# As Hunyuan's: it spells BOS out, writes no reasoning, and ends with a mark of its own where no answer is asked for.
HUNYUAN = """{{- '<｜hy_begin▁of▁sentence｜>' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '<｜hy_place▁holder▁no▁3｜>' }}{%- endif %}
{%- for m in messages %}{%- if m['role'] == 'user' %}{{- '<｜hy_User｜>' + m['content'] }}
{%- elif m['role'] == 'assistant' %}{%- set c = m['content'] %}
{%- if '</think>' in c and not loop.last %}{%- set c = c.split('</think>')[-1] %}{%- endif %}
{{- '<｜hy_Assistant｜>' + c + '<｜hy_place▁holder▁no▁2｜>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜hy_Assistant｜>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- else %}{{- '<｜hy_place▁holder▁no▁8｜>' }}{%- endif %}"""

# As Seed-OSS's: BOS begins each turn, EOS ends it, and a thought stands in marks of its own.
SEED = """{%- for m in messages %}{{- '<seed:bos>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- if m.reasoning_content is defined and m.reasoning_content | trim %}
{{- '<seed:think>' + m.reasoning_content | trim + '</seed:think>\\n' }}{%- endif %}
{{- m.content | trim + '<seed:eos>' }}{%- else %}{{- m.content + '<seed:eos>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<seed:bos>assistant\\n' }}{%- endif %}"""


def trl_template(name: str) -> str:
    """A template file of the installed trl, which is not imported."""
    [package] = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(package) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def gemma_tokenizer(special: tuple[str, ...], template: str | dict[str, str] | None) -> Any:
    """A small Gemma tokenizer (SentencePiece's BPE with byte fallback), which adds a BOS by itself."""
    tokenizer = copy.deepcopy(_gemma_tokenizer(special))
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _gemma_tokenizer(special: tuple[str, ...]) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=460, special=special))
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
            "unk_token": "<unk>", "extra_special_tokens": list(special)}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


# How Llama 3 and Qwen cut a text into words, and GPT-2, whose way SmolLM2 has: the words differ in their line ends.
LLAMA_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_tokenizer(special: tuple[str, ...], template: str | None, words: str = LLAMA_WORDS,
                   others: tuple[str, ...] = ()) -> Any:
    """A small byte-level BPE tokenizer, as Llama 3, Qwen and SmolLM2 have; ``others`` are added but not special."""
    tokenizer = copy.deepcopy(_byte_tokenizer(special, words, others))
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _byte_tokenizer(special: tuple[str, ...], words: str, others: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    corpus = [*CORPUS, "a\n\nb", "x\n\n\n  y", "model\n\n", "assistant\n\n", "  two   three    four"] * 4
    backend.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens(["<bos>", "<eos>", *special])
    backend.add_tokens([AddedToken(other, normalized=False) for other in others])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")


def gpt_oss_tokenizer() -> Any:
    """A byte-level tokenizer with GPT-OSS's own template, and the marks that it writes."""
    return byte_tokenizer(HARMONY, trl_template("gptoss"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, text: str = "", *, id: str = "call00001", reasoning: str | None = None,
         **arguments: Any) -> dict[str, Any]:
    """An assistant's turn that calls one function."""
    more = {} if reasoning is None else {"reasoning_content": reasoning}
    return assistant(text, tool_calls=[
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}], **more)


def result(text: str, *, id: str = "call00001", name: str = "weather") -> dict[str, Any]:
    """What a function returned."""
    return {"role": "tool", "tool_call_id": id, "name": name, "content": text}


TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells the weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}}}]


def spans(chat: Any, encoded: Any) -> list[str]:
    """The learned stretches of a sequence as text."""
    return [chat.tokenizer.decode(encoded.ids[start:end]) for start, end in encoded.spans.tolist()]


def learned(chat: Any, sequences: Any) -> list[list[str]]:
    """The learned stretches of each sequence as text."""
    return [spans(chat, sequence) for sequence in sequences]
