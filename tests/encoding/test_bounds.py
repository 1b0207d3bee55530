"""Templates that loop or multiply end soon; others are rendered as Transformers does."""

import shutil
import time
import tracemalloc

import pytest

from gemma_tune.encoding import bounds
from gemma_tune.encoding.rendering import compiled
from support.templates import SMOLLM2

BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "times": "{{ 'x' * 10 ** 10 }}", "list": "{% set x = [0] * 10 ** 10 %}", "power": "{{ 10 ** 100000000 }}",
    "squares": "{% set x = 99 %}" + "{% set x = x * x %}" * 40,
    "concat": "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 60,
    "plus": "{% set x = 'xx' %}" + "{% set x = x + x %}" * 60,
    "block": "{% set x = 'xx' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "output": "{% set x = 'x' * 1000000 %}{% for n in range(99999) %}{{ x }}{% endfor %}",
    "within": "{% set x = 'x' * 1000000 %}{% set y %}{% for n in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "nested": "{% set x = ['xx'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "nested json": "{% set x = ['xx'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x | tojson }}",
    "format": "{{ '%999999999d' % 1 }}", "format filter": "{{ '%999999999d' | format(1) }}",
    "method": "{{ '{:999999999}'.format(1) }}", "center": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}", "replace": "{% set x = 'x' * 100000 %}{{ x.replace('x', x) }}",
    "replace filter": "{% set x = 'x' * 100000 %}{{ x | replace('x', x) }}",
    "join": "{% set x = 'x' * 100000 %}{{ ([x] * 99999) | join }}", "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "lorem": "{{ lipsum(n=1000000000) }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_would_not_end(source, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(bounds, "MOST_CHARACTERS", 1 << 22)
    compiled("")  # the libraries
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match="it takes more than|it makes|lipsum"):
            compiled(source).render(messages=[])
        assert time.monotonic() - start < 2 and tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [
    SMOLLM2, "{{ 1 + 2 }} {{ 2 * 3 }} {{ 2 ** 3 }} {{ 7 % 2 }} {{ '%s!' % 'a' }} {{ 'a' * 3 }} {{ 'a' ~ 1 ~ none }}",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{% for t in messages %}"
    "{{ loop.index }}{{ m(t.content) | trim }}{% else %}-{% endfor %}",
    "{{ messages }} {{ messages | tojson(indent=2) }} {{ messages | map(attribute='role') | join(', ') }} {{ missing }}",
    "{% set ns = namespace(n=0) %}"
    "{% for t in messages if t.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for t in messages %}{% generation %}{{ t.content.split('\n')[-1].strip() }}{% endgeneration %}{% endfor %}",
])
def test_other_templates_are_rendered_as_transformers_does(source):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    given = {"messages": [{"role": "user", "content": "q\nr "}, {"role": "assistant", "content": "a"}],
             "add_generation_prompt": True}
    assert compiled(source).render(**given) == _compile_jinja_template(source).render(**given)


def test_what_a_rendering_made_does_not_count_for_the_next(monkeypatch):
    monkeypatch.setattr(bounds, "MOST_CHARACTERS", 1000)
    template = compiled("{{ 'x' * 400 }}")
    assert {template.render() for _ in range(5)} == {"x" * 400}


def test_a_model_whose_template_loops_ends_the_command(tiny, tmp_path, cli, data, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.05)
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "chat_template.jinja").write_text(BOMBS["loops"])
    result = cli("prepare", data, "--model", model)
    assert result.code == 2 and "the model's chat template cannot be used: line 1: it takes more than 0.05 seconds" in result.err
