"""``train`` and ``tune`` on rows with pictures: each is looked at once, and answers come to depend on what is seen."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from train.test_captured_units import same_figures
from train.test_captured_whole import as_on_a_gpu  # noqa: F401 - a fixture

from gemma_tune.answers import sight
from gemma_tune.answers.generation import BROKEN
from gemma_tune.encoding.eye import pictures_of
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.train import captured, looking, packed, samples, stage
from gemma_tune.train.captured_pictures import LearnedPictures
from gemma_tune.train.effect import ROWS
from gemma_tune.train.trainer import GemmaTrainer
from support.command import MANIFEST_SCHEMA
from support.graphs import Graph
from support.seeing import Looking
from support.shown import COLOURS, begun, kept, plain, prepare, row
from support.towers import make_seer
from support.training import stop_at

RUN = Path("runs/seer")
QUICK = ("--dtype", "fp32", "--rank", 8, "--learning-rate", 5e-3, "--samples", 0)
SHORT = (*QUICK, "--epochs", 2)
LAST = 14  # steps of the short training
PICTURES = 28


@pytest.fixture(scope="session")
def coloured_once(seer, tmp_path_factory) -> Path:
    """A run of questions for the colour of a picture, and some of text."""
    run = begun(seer, tmp_path_factory.mktemp("coloured") / "run")
    names = {(c, n): kept(run, plain(c, n)) for c in COLOURS for n in range(7)}
    text = [row("It is four.", question=f"What is {n} and two?") for n in range(4)]
    return prepare(seer, run, [row(c, names[c, n]) for n in range(6) for c in COLOURS] + text,
                   [row(c, names[c, 6]) for c in COLOURS])


@pytest.fixture
def coloured(coloured_once, seer) -> Path:
    """A run of one's own, and its model where its manifest looks for it."""
    shutil.copytree(seer, Path("seer"))
    shutil.copytree(coloured_once, RUN)
    manifest = json.loads((RUN / "manifest.json").read_text())
    manifest["model"]["path"] = "../../seer"
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    return RUN


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """Names of the pictures that are looked at from here on."""
    found, see = [], sight.see
    monkeypatch.setattr(sight, "see", lambda model, eye, name: found.append(name) or see(model, eye, name))
    return found


def adapter(run: Path = RUN) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*_lora_adapter")) / "adapter_model.safetensors")


def log(run: Path = RUN) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_answer_comes_to_depend_on_the_picture(cli, coloured, looked, monkeypatch):
    """Of four colours nothing but the picture tells which; in validation it is another picture. Each is looked at once, and
    what sees is gone before the text model is loaded."""
    towers, step, gone = [], GemmaTrainer.training_step, []
    load, load_towers = stage.load_model, looking.load_towers

    def towers_loaded(*args):
        gone.append(weakref.ref(found := load_towers(*args)))
        return found

    def loaded(*args, **how):
        assert gone[0]() is None, "what sees is gone before the model that learns is there"
        return load(*args, **how)

    monkeypatch.setattr(looking, "load_towers", towers_loaded)
    monkeypatch.setattr(stage, "load_model", loaded)

    def watched(self, *args, **how):
        towers.append(sum(p.numel() for name, p in self.model.named_parameters() if "vision" in name))
        return step(self, *args, **how)

    monkeypatch.setattr(GemmaTrainer, "training_step", watched)
    done = cli("train", *QUICK, "--epochs", 10, "--json")
    assert done.code == 0, done.err
    summary = done.json["summary"]
    assert summary["eval_loss_before"] > 5 and summary["eval_loss_after"] < 0.2, "ln 4 / 2 = 0.69 without looking"
    assert len(looked) == len({*looked}) == summary["pictures"] == PICTURES
    assert "28 pictures, 28 of them to be looked at, once, before the first step" in done.err
    assert summary["startup_seconds"]["pictures"] > 0 and " pictures " in done.err
    assert len(towers) > 60 and not any(towers)
    jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)
    assert len(list((RUN / "seen").glob("*/*.safetensors"))) == PICTURES
    first = adapter()
    again = cli("train", *QUICK, "--epochs", 10, "--force", "--json")
    assert again.code == 0, again.err
    assert len(looked) == PICTURES and "28 pictures, all looked at before" in again.err
    assert equal(first, adapter())
    size = sum(path.stat().st_size for path in (RUN / "seen").glob("*/*"))
    status = cli("status", "--json")
    assert status.json["seen_bytes"] == size > PICTURES * 4 * 64 * 4 and "seen/ (" in status.err + cli("status").err
    shutil.rmtree(RUN / "seen")
    assert cli("status", "--json").json["seen_bytes"] == 0 and "seen/" not in cli("status").err
    assert cli("train", *SHORT, "--force").code == 0
    assert len(looked) == 2 * PICTURES, "what was seen can be deleted"


@pytest.mark.parametrize("mixed", [False, True])
def test_questions_are_answered_while_it_is_learned(cli, coloured, monkeypatch, mixed):
    """By what the model saw, as by one that looks itself; also where every row that is kept aside has a picture."""
    monkeypatch.setattr(samples, "SHARE", 1000.0)
    monkeypatch.setattr(samples, "MOST_TOKENS", 6)
    valid = [json.loads(line) for line in (RUN / "data" / "valid.jsonl").read_text().splitlines()]
    if mixed:
        train = [json.loads(line) for line in (RUN / "data" / "train.jsonl").read_text().splitlines()]
        valid = [valid[0], row("It is nine.", question="What is seven and two?"), *valid[1:3]]
        prepare(Path("seer"), RUN, train, valid)
    done = cli("train", *QUICK[:-2], "--epochs", 3, "--samples", 3, "--keep", "last", "--json")
    assert done.code == 0, done.err
    found = [json.loads(line) for line in (RUN / "logs" / "samples.jsonl").read_text().splitlines()]
    last = done.json["summary"]["steps"]
    assert {record["step"] for record in found} > {0, last} and "no sample answers" not in done.err
    looking = Looking(Path("seer"), RUN)
    for n, asked in enumerate(valid[:3]):
        turns, names = asked["messages"][:-1], pictures_of(asked["messages"])
        records = [record for record in found if record["prompt"] == n]
        assert all(record["begins"] == turns[0]["content"] and record.get("pictures", []) == names for record in records)
        assert [records[0]["answer"].rstrip(BROKEN), records[-1]["answer"].rstrip(BROKEN)] == looking.answers(turns, 6)
        said = f"“{turns[0]['content']}”" + "".join(f" ({name[:8]}….png)" for name in names)
        assert f"before the first step, {said}: " in done.err and f"after step {last}, {said}: " in done.err
        assert f"{said} – base model: " in done.err
    assert len({record["answer"] for record in found if record["step"] == last}) > 1, "the picture matters"


def test_pictures_that_were_not_looked_at_are_not_asked_about(cli, coloured, monkeypatch):
    """As of a row that is too long to be learned."""
    monkeypatch.setattr(samples, "SHARE", 1000.0)
    monkeypatch.setattr(samples, "MOST_TOKENS", 6)
    train, valid = ([json.loads(line) for line in (RUN / "data" / f"{side}.jsonl").read_text().splitlines()]
                    for side in ("train", "valid"))
    valid.insert(0, row("And so on. " * 2000, kept(RUN, plain("red", 9))))
    prepare(Path("seer"), RUN, train, valid)
    done = cli("train", *QUICK[:-2], "--max-steps", 1, "--samples", 1)
    assert done.code == 0 and "no sample answers" not in done.err, done.err
    found = [json.loads(line) for line in (RUN / "logs" / "samples.jsonl").read_text().splitlines()]
    assert {tuple(record["pictures"]) for record in found} == {tuple(pictures_of(valid[1]["messages"]))}


def test_with_other_pictures_it_is_not_learned(cli, coloured):
    """What the test above tells by its loss."""
    names = [path.name for path in sorted((RUN / "data" / "pictures").iterdir())]
    prepare(Path("seer"), RUN, [row(c, names[0]) for c in COLOURS] * 6, [row(c, names[0]) for c in COLOURS])
    done = cli("train", *QUICK, "--epochs", 10, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["eval_loss_after"] > 0.6


def test_rows_of_text_go_without_all_this(cli, coloured, monkeypatch):
    monkeypatch.setattr(looking, "look", lambda *_: pytest.fail("it looked"))
    text = [row(f"It is {n}.", question=f"What is {n} and nothing?") for n in range(6)]
    prepare(Path("seer"), RUN, text, text[:2])
    done = cli("train", *SHORT, "--json")
    assert done.code == 0, done.err
    assert "pictures" not in done.json["summary"] and not (RUN / "seen").exists() and "picture" not in done.err


@pytest.mark.parametrize("flags", [("--dora",), ("--qlora",), ("--dropout", 0.2), ("--activation-checkpointing",), ("--compile",)],
                         ids=lambda flags: flags[0])
def test_in_every_way_it_is_learned(cli, coloured, flags):
    done = cli("train", *QUICK, "--epochs", 10, *flags, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["eval_loss_after"] < 0.3


def test_with_the_text_model_in_4_bits_it_sees_as_without(cli, coloured):
    """What was seen is the same file: it is looked at in 16 bits."""
    found = []
    for flags in ((), ("--qlora", "--force")):
        shutil.rmtree(RUN / "seen", ignore_errors=True)
        assert cli("train", *SHORT, *flags).code == 0
        found.append({path.name: load_file(path)[sight.SEEN] for path in (RUN / "seen").glob("*/*")})
    assert len(found[0]) == PICTURES and equal(*found)


def test_nothing_is_compiled_for_pieces_with_pictures(cli, coloured, monkeypatch):
    """The longest batch, which is tried, is one of these."""
    import torch._dynamo as dynamo

    dynamo.reset()
    counts = dynamo.utils.counters["frames"]
    counts.clear()
    names = [path.name for path in sorted((RUN / "data" / "pictures").iterdir())]
    prepare(Path("seer"), RUN, [row(c, n) for c, n in zip([*COLOURS] * 3, names)], [row("red", names[0])])
    done = cli("train", *SHORT, "--compile")
    assert done.code == 0, done.err
    assert "compiling the model's layers" in done.err and not counts["total"]


def test_pieces_of_a_batch_teach_the_same(cli, coloured):
    assert cli("train", *SHORT, "--micro-batch", 4).code == 0
    whole = adapter()
    for flags in (("--micro-batch", 1), ("--micro-batch", 3, "--activation-checkpointing")):
        assert cli("train", *SHORT, *flags, "--force").code == 0
        assert all((adapter()[name] - whole[name]).norm() < 1e-4 * whole[name].norm() for name in whole)


def test_a_training_goes_on_as_if_it_had_not_stopped(cli, coloured, looked, monkeypatch):
    assert cli("train", *SHORT).code == 0
    whole = adapter()
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        stopped = cli("train", *SHORT, "--force")
        assert stopped.code == 130, stopped.err
    done = cli("train", *SHORT, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["resumed_from_step"] == 5 and equal(whole, adapter())
    longer = cli("train", *QUICK, "--epochs", 4, "--continue", "--json")
    assert longer.code == 0, longer.err
    assert longer.json["summary"]["steps"] == 2 * LAST and longer.json["summary"]["pictures"] == PICTURES
    assert len(looked) == PICTURES


def test_looking_that_was_interrupted_goes_on(cli, coloured, looked, monkeypatch):
    see = sight.see

    def stops(model, eye, name):
        if len(looked) == 9:
            raise KeyboardInterrupt
        return see(model, eye, name)

    with monkeypatch.context() as patch:
        patch.setattr(sight, "see", stops)
        assert cli("train", *SHORT).code == 130
    assert len(looked) == 9
    done = cli("train", *SHORT)
    assert done.code == 0, done.err
    assert "28 pictures, 19 of them to be looked at" in done.err
    assert len(looked) == len({*looked}) == PICTURES


def test_tune_looks_once_and_does_what_train_would(cli, coloured, looked):
    done = cli("tune", "--learning-rates", "1e-5,5e-3", "--ranks", 8, "--dtype", "fp32", "--minutes", 5, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["learning_rate"] == 5e-3
    losses = {trial["learning_rate"]: trial["eval_loss"] for trial in done.json["summary"]["trials"]}
    assert losses[5e-3] < 2 < losses[1e-5]
    assert len(looked) == PICTURES
    assert cli("train", "--config", RUN / "tune.yaml", "--dtype", "fp32").code == 0
    assert len(looked) == PICTURES


def test_two_processes_look_at_half_of_them_each(cli, coloured, forks):
    flags = (*SHORT, "--batch-size", 2)
    done = forks.run("train", "--run", RUN, *flags, "--num-processes", 2, "--json")
    assert done.code == 0, done.err
    assert len(list((RUN / "seen").glob("*/*.safetensors"))) == PICTURES
    both, figures = adapter(), log()
    alone = cli("train", *flags, "--accumulation", 2, "--num-processes", 1, "--force")
    assert alone.code == 0, alone.err
    assert [r["loss"] for r in log() if "loss" in r] == pytest.approx([r["loss"] for r in figures if "loss" in r], rel=1e-4)
    assert all((adapter()[name] - both[name]).norm() < 1e-3 * both[name].norm() for name in both)


def test_a_picture_that_one_process_cannot_read_ends_both(coloured, forks):
    """It was whole when the main one looked, so to speak: its size can be read, its points cannot."""
    for path in (RUN / "data" / "pictures").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    done = forks.run("train", "--run", RUN, *SHORT, "--num-processes", 2, "--json")
    assert done.code == 2, done.err
    assert done.err.count("Error: ") == 1 and "cannot be read" in done.err and "Traceback" not in done.err


# ---- what cannot be --------------------------------------------------------------------------------------------------

def test_the_model_is_not_divided_where_there_are_pictures(coloured, forks):
    done = forks.run("train", "--run", RUN, *SHORT, "--num-processes", 2, "--strategy", "fsdp", "--json")
    assert done.code == 2 and "--strategy fsdp does not go with pictures" in done.err and "Hint: leave --strategy out" in done.err


@pytest.mark.parametrize("what", ["one", "all", "damaged"])
def test_pictures_that_are_gone(cli, coloured, what):
    folder = RUN / "data" / "pictures"
    first = sorted(folder.iterdir())[0]
    if what == "one":
        first.unlink()
    elif what == "all":
        shutil.rmtree(folder)
    else:
        first.write_bytes(b"no picture")
    for flags in (("--dry-run",), ()):
        done = cli("train", *SHORT, *flags)
        assert done.code == 2 and "Traceback" not in done.err, done.err
        assert f"{folder}/" in done.err and ("cannot be read" if what == "damaged" else "is gone") in done.err
        assert "prepare --run runs/seer --force" in done.err
    assert not (RUN / "seen").exists()


def test_pictures_that_were_looked_at_need_not_be_there(cli, coloured):
    assert cli("train", *SHORT).code == 0
    shutil.rmtree(RUN / "data" / "pictures")
    done = cli("train", *SHORT, "--force")
    assert done.code == 0, done.err


def test_a_disk_without_room_for_what_is_seen(cli, coloured, monkeypatch):
    """28 pictures of 4 tokens of 64 numbers in fp32."""
    need = PICTURES * 4 * 64 * 4
    for free, code in ((looking._SPARE + need - 1, 1), (looking._SPARE + need, 0)):
        monkeypatch.setattr(looking.shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(1, 1, free))
        done = cli("train", *SHORT)
        assert done.code == code, done.err
        assert ("what is seen in 28 pictures takes" in done.err) == bool(code) == ("free some space" in done.err)


def test_memory_that_does_not_hold_what_sees_is_told_before(cli, coloured, monkeypatch):
    monkeypatch.setattr(looking, "tower_bytes", lambda checkpoint, item: 1 << 50)
    done = cli("train", *SHORT)
    assert done.code == 2 and "what the model sees pictures with needs" in done.err and "1,1" in done.err


def test_a_plan_says_how_many_there_are_to_look_at(cli, coloured):
    plan = cli("train", *SHORT, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert plan.json["pictures"].startswith("28 pictures, 28 of them to be looked at")
    assert not (RUN / "seen").exists()
    assert "28 pictures, 28 of them" in cli("train", *SHORT, "--dry-run").err


@pytest.mark.parametrize("what", ["gone", "cut off"])
def test_what_was_seen_cannot_be_read(cli, coloured, monkeypatch, what):
    assert cli("train", *SHORT).code == 0
    if what == "gone":  # in the middle of the training
        monkeypatch.setattr(looking, "look", lambda *_: None)
        load = sight.Seen.__getitem__
        monkeypatch.setattr(sight.Seen, "__getitem__", lambda self, name: (shutil.rmtree(RUN / "seen", True), load(self, name))[1])
    else:
        for path in (RUN / "seen").glob("*/*"):
            path.write_bytes(path.read_bytes()[:100])
    done = cli("train", *SHORT, "--force")
    assert done.code == 2 and "what was seen in pictures cannot be read from runs/seer/seen/" in done.err, done.err
    assert "Hint: delete runs/seer/seen, and repeat the command" in done.err


def test_rows_whose_picture_makes_the_loss_not_finite_are_named(cli, coloured):
    assert cli("train", *SHORT).code == 0
    name = json.loads((RUN / "data" / "train.jsonl").read_text().splitlines()[6])["messages"][0]["pictures"][0]["file"]
    path = next((RUN / "seen").glob(f"*/{Path(name).stem}.safetensors"))
    save_file({key: value * float("nan") for key, value in load_file(path).items()}, path)
    done = cli("train", *SHORT, "--force")
    assert done.code == 1, done.err
    assert "that comes from 1 of the 4 rows of its batch" in done.err and "train.jsonl:7" in done.err


# ---- another class for text ------------------------------------------------------------------------------------------

QWEN = ("{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}"
        "{% endfor %}{% endif %}<done>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_from_pictures_is_merged_and_answers_in_both_classes(cli, tmp_path, dora):
    """Qwen 3.5 has a class for text, which calls its layers otherwise; what is learned there is another case."""
    make_seer("qwen3.5", Path("qwen"))
    Path("qwen/chat_template.jinja").write_text(QWEN)
    run = begun(Path("qwen"), Path("runs/qwen"))
    names = {(c, n): kept(run, plain(c, n)) for c in COLOURS for n in range(2)}
    prepare(Path("qwen"), run, [row(c, name) for (c, _), name in names.items()], [row("red", names["red", 1])])
    done = cli("train", "--run", run, *SHORT, "--target-modules", "q_proj,up_proj", "--samples", 1, *(["--dora"] if dora else []))
    assert done.code == 0, done.err
    tensors = adapter(run)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    merged = cli("merge", "--run", run, "--no-check")
    assert merged.code == 0, merged.err
    before, after = load_file("qwen/model.safetensors"), load_file(run / "qwen_lora_merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.language_model.") and name.endswith(
        ("q_proj.weight", "up_proj.weight"))}
    base = Placement("cpu", torch.float32, "test")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = load_model(run / "qwen_lora_merged", base).eval()(input_ids=ids).logits
        folder = run / "qwen_lora_adapter"
        for kind in ("none", "features"):
            model = load_model(Path("qwen"), base, sight=kind).eval()
            plain_logits = model(input_ids=ids).logits
            logits = add_adapter(model, folder)(input_ids=ids).logits
            assert (logits - expected).norm() < 0.25 * (logits - plain_logits).norm(), "but for rounding to bf16"


def test_an_adapter_from_text_sees(cli, tmp_path):
    """The other way round: trained on text alone, and asked with pictures."""
    make_seer("qwen3.5", Path("qwen"))
    Path("qwen/chat_template.jinja").write_text(QWEN)
    run = begun(Path("qwen"), Path("runs/qwen"))
    assert cli("train", "--run", run, *SHORT, "--target-modules", "q_proj,up_proj").code == 0
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter(run))
    base, ids = Placement("cpu", torch.float32, "test"), torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = [add_adapter(load_model(Path("qwen"), base, sight=kind).eval(), run / "qwen_lora_adapter")(input_ids=ids).logits
                  for kind in ("none", "features")]
        plain_logits = load_model(Path("qwen"), base).eval()(input_ids=ids).logits
    torch.testing.assert_close(*logits)
    assert (logits[0] - plain_logits).norm() > 0.05 * plain_logits.norm()


# ---- as on a GPU -----------------------------------------------------------------------------------------------------

def captured_bodies(monkeypatch) -> list[str]:
    """What is captured from here on: the kinds of steps, those with a backward pass as they are, others in brackets."""
    made, found = captured.CapturedSteps._made, []
    monkeypatch.setattr(captured.CapturedSteps, "_made", lambda self, bucket: (
        found.append(self.body.what if self.backward else f"({self.body.what})") or made(self, bucket)))
    return found


@pytest.mark.parametrize("flags", [(), ("--activation-checkpointing",)], ids=["kept", "recomputed"])
def test_a_training_on_pictures_is_captured_and_the_same(cli, coloured, request, monkeypatch, flags):
    """Each epoch mixes its batches anew, so that a shape is replayed for other pictures; in the validation, too. The model
    learns which colour it is, which it would not from the pictures of the first piece alone."""
    names = sorted(path.name for path in (RUN / "data" / "pictures").iterdir())
    rows = [json.loads(line) for line in (RUN / "data" / "train.jsonl").read_text().splitlines()]
    valid = [json.loads(line) for line in (RUN / "data" / "valid.jsonl").read_text().splitlines()]
    prepare(Path("seer"), RUN, [one for one in rows if pictures_of(one["messages"])], valid)
    command = ("train", *QUICK, "--epochs", 6, "--batch-size", 4, "--force", *flags)
    assert cli(*command).code == 0
    expected = log()
    request.getfixturevalue("as_on_a_gpu")
    bodies, read = captured_bodies(monkeypatch), []
    plain_inputs = looking.Shown.inputs
    monkeypatch.setattr(looking.Shown, "inputs", lambda self, *given: read.append(1) or plain_inputs(self, *given))
    done = cli(*command)
    assert done.code == 0, done.err
    assert "cannot be captured" not in done.err and "steps with pictures are captured in " in done.err
    assert {*bodies} == {"steps with pictures", "(steps with pictures)"}
    found = log()
    assert Graph.replays > 36 and len(read) == 1 + ROWS, "the longest batch before, and the change of the logits"
    same_figures(expected, found)
    assert found[-1]["eval_loss"] < 0.5 * found[0]["eval_loss"] and len(names) == PICTURES


def prepare_beside_text() -> None:
    """Rows about colours, and rows of text alone."""
    names = sorted(path.name for path in (RUN / "data" / "pictures").iterdir())
    words = [row(f"It is {n}.", question=f"What is {n} and nothing, please? " + "And so on. " * 3) for n in range(24)]
    prepare(Path("seer"), RUN, [row(c, n) for c, n in zip([*COLOURS] * 3, names)] + words, words[:6] + [row("red", names[0])])


def test_batches_with_and_without_pictures_are_captured_apart(cli, coloured, request, looked, monkeypatch):
    """The same figures as without captured steps."""
    prepare_beside_text()
    flags = ("train", *QUICK, "--epochs", 3, "--force")
    assert cli(*flags).code == 0
    expected = log()
    request.getfixturevalue("as_on_a_gpu")
    bodies = captured_bodies(monkeypatch)
    done = cli(*flags)
    assert done.code == 0, done.err
    assert "cannot be captured" not in done.err and Graph.replays > 10
    assert {*bodies} == {"steps", "(steps)", "steps with pictures", "(steps with pictures)"}
    same_figures(expected, log())


def test_the_largest_is_captured_first_also_where_rows_of_text_are_tried_packed(cli, coloured, request, monkeypatch):
    """A pool of memory gives nothing back: what is larger would be taken beside what is there."""
    names = sorted(path.name for path in (RUN / "data" / "pictures").iterdir())
    words = [row("4.", question="2 + 2?") for n in range(24)]
    prepare(Path("seer"), RUN, [row(c, n) for c, n in zip([*COLOURS] * 3, names)] + words, words[:2])
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(packed, "PADDED_TOO_MUCH", -1)
    bodies = captured_bodies(monkeypatch)
    done = cli("train", *QUICK, "--epochs", 3)
    assert done.code == 0, done.err
    assert bodies[0] == "steps with pictures" and "steps" in bodies


def test_what_cannot_be_captured_with_pictures_leaves_steps_of_text_alone(cli, coloured, request, monkeypatch):
    """Something looks at a number where there are pictures, which CUDA breaks a capture off for."""
    prepare_beside_text()
    command = ("train", *QUICK, "--epochs", 3, "--force")
    assert cli(*command).code == 0
    expected = log()
    request.getfixturevalue("as_on_a_gpu")
    loss = LearnedPictures.loss
    monkeypatch.setattr(LearnedPictures, "loss", lambda *args: loss(*args) * float(args[1].sum().item() >= 0))
    done = cli(*command)
    assert done.code == 0, done.err
    assert "steps with pictures cannot be captured here and go one kernel at a time" in done.err
    assert "note: steps cannot be captured" not in done.err and Graph.replays > 10
    same_figures(expected, log())
