"""``prepare --chat-template``: base models that have none, from their data to a GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from support.command import rows, write_rows
from support.llamas import TURNS, save_random, tokenizer_with_turns

# As QwQ's: thoughts are taken out of answers, and each prompt begins one.
ALWAYS = ("{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content.split('</think>')[-1].lstrip('\n') + '<done>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<turn>assistant\n<think>\n' }}{% endif %}")
OWN = TURNS.replace("<turn>", "=== ")


@pytest.fixture
def base(tmp_path) -> Path:
    """A Llama whose tokenizer has no template."""
    tokenizer = tokenizer_with_turns()
    tokenizer.chat_template = None
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    save_random(LlamaForCausalLM(config), tokenizer, tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", rows(12))


def test_a_base_model_gets_a_template_that_stays_with_what_is_trained(cli, base, chats):
    refused = cli("prepare", chats, "--model", base)
    assert refused.code == 2 and f"beside your data and --model: gemma-tune prepare --model {base} … --chat-template alpaca, or a Jinja file" in " ".join(refused.err.split())
    for args in (("prepare", chats, "--model", base, "--chat-template", "alpaca"),
                 ("train", "--max-steps", 40, "--learning-rate", 1e-2, "--samples", 0), ("merge",),
                 ("export-ollama", "--quant", "f16", "--no-create", "--no-measure")):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
    run = Path("runs/plain")
    for place in (run / "plain_lora_adapter", run / "plain_lora_merged"):
        assert "### Response:" in (place / "chat_template.jinja").read_text()
    modelfile = (run / "ollama/Modelfile").read_text()
    assert "### Instruction:\n{{ .Content }}" in modelfile and 'PARAMETER stop """<|endoftext|>"""' in modelfile
    for use in ("adapter", "merged", "gguf"):
        answer = cli("chat", "--prompt", "Say number 3.", "--use", use, "-n", 20, "--json")
        assert answer.json["answer"].startswith("The number"), use
    assert cli("chat", "--base", "--prompt", "Say number 3.", "-n", 3).code == 0, "which is asked in the same words"


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text("The number is 3, no more. " * 200)
    return tmp_path / "book.txt"


def test_plain_text_needs_no_template_and_its_model_continues_prompts(cli, base, book):
    for args in (("prepare", book, "--model", base, "--on-long", "split", "--max-length", 128, "--preview", 1),
                 ("train", "--max-steps", 40, "--learning-rate", 1e-2, "--samples", 0), ("merge",),
                 ("export-ollama", "--quant", "f16", "--no-create", "--no-measure")):
        result = cli(*args)
        assert result.code == 0, (args, result.err)
        if args[0] == "prepare":
            said = " ".join(result.err.split())
            assert "chat template: `completion`, as plain has none and plain text needs none: a prompt is continued" in said
            assert "⟦The number is 3" in said and "will not take this model" not in said
    run = Path("runs/plain")
    assert 'eq .Role "user" }}{{ .Content }}{{' in (run / "ollama/Modelfile").read_text()
    for use in ("adapter", "merged", "gguf"):
        answer = cli("chat", "--prompt", "The number is 3, no more. The number", "--use", use, "-n", 8, "--json")
        assert answer.json["answer"].startswith(" is 3, no"), use
    assert cli("chat", "--base", "--prompt", "The number", "-n", 3).code == 0
    again = cli("prepare", "--preview", 1)
    assert again.code == 0 and "up to date" in again.err and "⟦The number is 3" in again.err


def test_what_may_be_a_conversation_needs_a_template_all_the_same(cli, base, book, chats, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"The number is {n}. " * 20} for n in range(8)])
    for data in ((chats,), (book, chats), (texts,)):
        refused = cli("prepare", *data, "--model", base, "--on-long", "split")
        said = " ".join(refused.err.split())
        assert refused.code == 2 and "plain text alone, of .txt and .md files or with --format text, needs none" in said
    assert cli("prepare", texts, "--model", base, "--format", "text").code == 0
    refused = cli("prepare", chats)
    assert refused.code == 2 and "--chat-template alpaca, or" in " ".join(refused.err.split()), "texts before are no reason"
    assert cli("prepare", chats, "--chat-template", "completion").code == 0, "where it is asked for"


def test_run_takes_plain_text_for_a_base_model_to_its_end(cli, base, book):
    Path("quick.yaml").write_text("train: {rank: 4, dtype: fp32}\nexport-ollama: {verify: false, measure: false}\n")
    done = cli("run", book, "--model", base, "--on-long", "split", "--max-length", 128, "--max-steps", 2,
               "--config", "quick.yaml", "--json")
    assert done.code == 0, done.err
    assert list(done.json["stages"]) == ["prepare", "train", "eval", "merge", "export-ollama"]


def test_a_file_is_known_by_its_content_and_the_run_has_a_copy(cli, base, chats, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(OWN)
    assert cli("prepare", chats, "--model", base, "--chat-template", mine).code == 0
    again = cli("prepare", chats, "--chat-template", mine, "--json")
    assert again.json["status"] == "up-to-date" and cli("prepare", "--json").json["status"] == "up-to-date"
    mine.write_text("{# mine #}" + OWN)
    assert cli("status", "--json").json["stages"]["prepare"]["state"].startswith("stale")
    assert (changed := cli("prepare", "--json")).code == 0, changed.err
    assert changed.json["status"] == "done"
    mine.unlink()
    assert cli("prepare", "--json").json["status"] == "up-to-date", "as where data are gone"
    assert cli("train", "--max-steps", 1, "--samples", 0).code == 0
    assert "=== " in Path("runs/plain/plain_lora_adapter/chat_template.jinja").read_text()
    other = cli("prepare", write_rows(tmp_path / "other.jsonl", rows(14)[2:]), "--json")
    assert other.code == 0 and other.json["status"] == "done", other.err
    assert "chat template: ../../mine.jinja, as before" in other.err, "of which the run has a copy"
    assert Path("runs/plain/data/chat_template.jinja").read_text() == "{# mine #}" + OWN
    assert cli("prepare", "--json").json["status"] == "up-to-date"
    assert cli("status", "--json").json["stages"]["prepare"]["state"] == "done"


def test_a_models_own_template_is_replaced_where_that_is_wanted(cli, tiny, chats, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}: {{ m.content }}"
                                         "<end_of_turn>{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant: {% endif %}")
    assert cli("prepare", chats, "--model", tiny, "--chat-template", "mine.jinja", "--preview", 1).code == 0
    assert json.loads(Path("runs/tiny-gemma/manifest.json").read_text())["stages"]["prepare"]["config"]["chat_template"] == {
        "value": "../../mine.jinja", "from": "flag"}
    other = write_rows(tmp_path / "other.jsonl", rows(14)[2:])
    kept = cli("prepare", other, "--json")
    assert kept.json["status"] == "done" and "chat template: ../../mine.jinja, as before" in kept.err, "whatever the data"
    assert Path("runs/tiny-gemma/data/chat_template.jinja").exists()
    assert cli("prepare", other, "--chat-template", "own", "--json").json["status"] == "done"
    assert not Path("runs/tiny-gemma/data/chat_template.jinja").exists()


def test_a_template_of_another_model_is_refused_before_its_marks_are_learned(cli, base, chats, tmp_path):
    for name, template, said in (
            ("marks", TURNS.replace("<done>", "<|end|>").replace("{% endfor %}", "{{ eos_token }}{% endfor %}"),
             "writes '<|end|>' behind an answer, which is no special token of this model"),
            ("silent", TURNS.replace("{% if add_generation_prompt %}<turn>assistant\n{% endif %}", ""),
             "does not ask for an answer (add_generation_prompt), so that each would begin with '<turn>assistant\\n'")):
        (tmp_path / name).write_text(template)
        result = cli("prepare", chats, "--model", base, "--chat-template", name)
        assert result.code == 2 and said in " ".join(result.err.split()), result.err


@pytest.mark.parametrize(("name", "content", "said"), [
    ("gone.jinja", None, "gone.jinja"), ("words.jinja", b"hello", "there is no Jinja in it"), ("bytes.jinja", b"\xff\xfe{", "it is no text"),
    ("broken.jinja", b"{{ bos_token }}\n{% for %}", "the chat template broken.jinja cannot be used: line 2: Expected an expression"),
    ("typo.jinja", b"\n\n{% for m in messages %}{{ m.contents + eos_token }}{% endfor %}",
     "the chat template typo.jinja cannot be used: line 3: 'dict object' has no attribute 'contents'"),
    ("stern.jinja", b"{% for m in messages %}\n{{ raise_exception('no') }}{% endfor %}", "stern.jinja cannot be used: line 2: no"),
    ("odd.jinja", b"{% for m in messages %}{{ loop.length }}{{ m.content + eos_token }}{% endfor %}", "odd.jinja cannot be used: the chat template is not prefix-consistent"),
    ("ollama.jinja", b"{{ if .System }}{{ .System }}{{ end }}", "ollama.jinja is no Jinja, but a template of Go's"),
    ("tokenizer_config.json", b'{"chat_template": "{% for m in messages %}"}', "jq -r .chat_template tokenizer_config.json > chat_template.jinja"),
    ("checkpoint", None, "Is a directory; did you mean checkpoint/chat_template.jinja?"), ("seperate.jinja", None, "did you mean separate.jinja?"),
    ("Alpaca", None, "did you mean `alpaca`?"),
    ("chatml", None, "the chat template chatml ends an assistant's turn with '<|im_end|>', which is no special token of this model but 9 tokens "
     "of text, so a model trained on it could never stop Hint: use --chat-template alpaca, or a Jinja file that writes eos_token behind an "
     "answer: both end it with this tokenizer's <|endoftext|>; or train another model, one whose vocabulary has <|im_end|>"),
    ("silent.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}", "silent.jinja does not end an assistant's turn with a special token")])
def test_what_cannot_be_used_is_told(cli, base, chats, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoint").mkdir()
    for place in ("separate.jinja", "checkpoint/chat_template.jinja"):
        (tmp_path / place).write_text(OWN)
    result = cli("prepare", chats, "--model", base, "--chat-template", name)
    assert result.code == 2 and said in " ".join(result.err.split()) and "Hint:" in result.err, result.err
    assert "the model's chat template" not in result.err


def test_chatml_is_proposed_to_a_vocabulary_with_its_tokens(cli, base, chats):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    refused = cli("prepare", chats, "--model", base)
    assert "--chat-template alpaca, chatml, or a Jinja file" in refused.err
    assert cli("prepare", chats, "--model", base, "--chat-template", "chatml").code == 0


def test_a_model_that_has_a_template_is_not_given_another_for_nothing(cli, tiny, chats):
    result = cli("prepare", chats, "--model", tiny, "--chat-template", "chatml")
    assert result.code == 2 and "Hint: leave --chat-template out, as this model has a template; or use --chat-template alpaca" in result.err


def test_marks_that_are_no_tokens_are_told_where_a_template_can_be_learned_all_the_same(cli, base, chats, tmp_path):
    (tmp_path / "marks.jinja").write_text("{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}"
                                          "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}")
    said = "the chat template writes <|user|> and <|bot|>, which this model's vocabulary does not have: several tokens of text each time"
    assert said in (result := cli("prepare", chats, "--model", base, "--chat-template", "marks.jinja", "--json")).json["warnings"], result.err
    assert not cli("prepare", chats, "--model", base, "--chat-template", "alpaca", "--json").json["warnings"]


def test_the_models_own_broken_template_is_told_with_its_line(cli, base, chats):
    (base / "chat_template.jinja").write_text("{{ bos_token }}\n\n{% for m in messages %}{{ m.contents + eos_token }}{% endfor %}")
    result = cli("prepare", chats, "--model", base)
    assert result.code == 2 and "the model's chat template cannot be used: line 3: 'dict object' has no attribute 'contents'" in result.err
    assert f"mend its chat_template.jinja, or give it another: gemma-tune prepare --model {base} … --chat-template" in result.err


def test_a_model_that_always_thinks_is_told_not_to_from_training_to_gguf(cli, base, tmp_path):
    (base / "chat_template.jinja").write_text(ALWAYS)
    reasoned = [{"messages": [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nSo."}]} for n in range(2)]
    chats = write_rows(tmp_path / "rows.jsonl", [*rows(12), *reasoned])
    with_thoughts = cli("prepare", chats, "--model", base, "--thinking", "on", "--run", "on", "--json")
    assert with_thoughts.code == 0 and with_thoughts.json["summary"]["rejected_rows"] == 0, with_thoughts.err
    for args in (("prepare", chats, "--model", base, "--thinking", "off"), ("train", "--max-steps", 1, "--samples", 0),
                 ("merge",), ("export-ollama", "--quant", "f16", "--no-create", "--no-measure")):
        result = cli(*args, "--json")
        assert result.code == 0, (args, result.err)
        if args[0] == "prepare":
            assert result.json["summary"]["rejected_rows"] == 2
    rejected = [json.loads(line) for line in Path("runs/plain/data/rejected.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rejected} == {"the prompt asks for an answer without reasoning (thinking is off), and this one has some"}
    assert {row["fix"] for row in rejected} == {"prepare with --thinking on, or remove the reasoning from the turn"}
    assert "<think>\\n\\n</think>\\n\\n" in Path("runs/plain/ollama/Modelfile").read_text()
    prompts = [line.split(" | ") for line in Path("runs/plain/ollama/report.md").read_text().splitlines() if "| template only |" in line]
    assert len(prompts) > 10 and {llama_cpp for _, _, llama_cpp, _ in prompts} == {"equal"}
