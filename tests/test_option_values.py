"""Values of options that YAML 1.1, which jsonargparse reads numbers by, takes for others than they look like."""

import dataclasses

import pytest
from jsonargparse import ArgumentError
from shared import run_cli

from tinytl_hf import TinyTLError, cli
from tinytl_hf.commands import VERBS
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.run import Config, flat
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.verbs import BenchConfig, MemoryTableConfig
from tinytl_hf.explained import OTHERS, explained


@pytest.fixture
def read(monkeypatch):
    """What the options of a command line become."""
    got = []
    verbs = {name: dataclasses.replace(verb, does=got.append) for name, verb in VERBS.items()}
    monkeypatch.setattr(cli, "VERBS", verbs)

    def read(*argv):
        cli.execute([str(word) for word in argv])
        return got[-1]

    return read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--minutes", "1:30"], "minutes=1:30: use a number or null, written in decimal digits"),
        (["fit", "--minutes=1:30.5"], "minutes=1:30.5: use a number or null"),
        (["train", "--data.workers", "12:30:00"], "data.workers=12:30:00: use a whole number"),
        (["train", "--data.workers", "+017"], r"data.workers=\+017: use a whole number"),
        (["train", "--data.workers", "0_17"], "data.workers=0_17: use a whole number"),
        (["train", "--trained_blocks", "1:30"], "trained_blocks=1:30: use a whole number or all"),
        (["train", "--train.lr_factors.head", "0:30"], "train.lr_factors.head=0:30: use a number"),
        (["train", "--train", "{lr: '1:30'}"], "train.lr=1:30: use a number or null"),
        (["train", "--data.crop_scale", "[0:30, 1]"], "data.crop_scale=0:30: use a list of 2 values"),
        (["bench", "--train_sizes", "[96, 1:30]"], "train_sizes=1:30: use a list of values"),
        (["bench", "--train_sizes+", "1:30"], "train_sizes=1:30: use a list of values"),
        (["eval", "--adapter", "x", "--batch_size", "1:30"], "batch_size=1:30: use a whole number"),
    ],
)
def test_a_time_is_no_number(words, message, read):
    with pytest.raises(TinyTLError, match=f"^{message}"):
        read(*words)


@pytest.mark.parametrize(
    ("verb", "text", "message"),
    [
        ("train", "train: {lr: 1:30}", "train.lr=1:30: use a number or null"),
        ("train", "trained_blocks: '1:30'", "trained_blocks=1:30: use a whole number or all"),
        ("bench", "train_sizes: [1:30]", "train_sizes=1:30: use a list of values"),
        ("train", "data: parts/data.yaml", "data.workers=1:30: use a whole number"),
    ],
)
def test_a_time_in_a_file_is_no_number(verb, text, message, read, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "data.yaml").write_text("workers: 1:30")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(TinyTLError, match=f"^{message}"):
        read(verb, "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text", ["1:30", "12:30:00", "1_000", "yes", "off", "2024-01-01", "NaN", "inf", "+017", "0_17"]
)
def test_a_text_stays_what_was_written(text, read, tmp_path):
    values = read("train", f"--data.label_column={text}", f"--data.dataset={text}", f"--metrics=['{text}']")
    assert (values.data.label_column, values.data.dataset, values.metrics) == (text, text, [text])
    (tmp_path / "run.yaml").write_text(f"data: {{label_column: '{text}'}}\nmetrics: ['{text}']")
    values = read("train", "--config", tmp_path / "run.yaml")
    assert (values.data.label_column, values.metrics) == (text, [text])


@pytest.mark.parametrize(
    ("text", "number"), [("1_000", 1000), ("017", 17), ("-0", 0), ("0x1F", 31), ("+5", 5), ("0b11", 3)]
)
def test_a_number_that_can_be_read_in_one_way_is_that(text, number, read, tmp_path):
    assert read("train", f"--data.workers={text}").data.workers == number
    (tmp_path / "run.yaml").write_text(f"data: {{workers: {text}}}")
    assert read("train", "--config", tmp_path / "run.yaml").data.workers == number


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trained_blocks", "null"], "trained_blocks=None: use all or a whole number"),
        (["--trained_blocks", "1."], "trained_blocks=1.: use all or a whole number"),
        (["--trained_blocks", "a"], "trained_blocks=a: use all or a whole number"),
        (["--data.max_train_samples", "1."], "data.max_train_samples=1.: use a whole number or null"),
        (["--train.mixed_precision", "a"], "train.mixed_precision=a: use one of no, bf16, fp16 or null"),
        (["--metrics", "null"], "metrics=None: use values in brackets\n"),
    ],
)
def test_the_fix_is_of_the_option_whatever_the_value(words, message):
    done = run_cli("train", *words)
    assert done.returncode == 2 and done.stderr == f"tinytl-hf: error: {message.rstrip()}\n"


def test_a_number_for_a_text_in_a_file_is_to_be_quoted(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {label_column: 2024}")
    done = run_cli("train", "--config", tmp_path / "run.yaml")
    assert "data.label_column=2024: use a text (in a file, in quotes) or null" in done.stderr


@pytest.mark.parametrize(
    ("verb", "text", "told"),
    [
        ("eval", "backbone.weights=x: no such file", "weights=x: no such file"),
        (
            "predict",
            "or name it with --backbone.weights x/backbone.weights",
            "or name it with --weights x/backbone.weights",
        ),
        ("eval", "train.mixed_precision=fp16: use bf16", "mixed_precision=fp16: use bf16"),
        ("train", "backbone.weights=x: no such file", "backbone.weights=x: no such file"),
        ("export", "train it with --lite.norm group", "train it with --lite.norm group"),
    ],
)
def test_a_mistake_is_told_by_the_name_that_the_verb_has_for_the_option(verb, text, told):
    assert explained(TinyTLError(text), verb) == told


def test_weights_that_are_not_there_are_told_by_the_options_own_name(tmp_path, make_model):
    make_model("FT-Last").save_pretrained(tmp_path)
    done = run_cli("predict", "--adapter", tmp_path, "--weights", "nosuch", "x.png")
    assert done.stderr.startswith("tinytl-hf: error: weights=nosuch: use imagenet")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.lr", ""], "train.lr=: use a number or null"),
        (["--data.workers="], "data.workers=: use a whole number"),
        (["--config="], "config=: it is empty, as of a variable that is not set; name a file"),
        (["--config", ""], "config=: it is empty, as of a variable that is not set; name a file"),
        (["--lr", "1"], "lr: no such option; did you mean train.lr?"),
        (["--learning-rate", "1"], "learning-rate: no such option; did you mean train.lr?"),
        (["--train.learning_rate=1"], "train.learning_rate: no such option; did you mean train.lr?"),
        (["--train.warmup-epochs", "1"], "train.warmup-epochs: no such option; did you mean train.warmup_epochs?"),
        (["--no-data.flip"], "no-data.flip: no such option; did you mean data.flip?"),
        (
            ["--batch_size", "8"],
            "batch_size: this verb has no such option (eval, memory, export have); it has train.global_batch_size",
        ),
        (["a/b c"], "a/b: no option stands before it; --data.dataset a/b names data; see --help"),
        (["data.dataset=digits"], "data.dataset=digits: write --data.dataset=digits"),
        (["--data", "digits"], "data=digits: it is a group of options; name one, as --data.dataset digits"),
        (["--backbone", "x"], "backbone=x: it is a group of options; name one, as --backbone.name x"),
    ],
)
def test_what_was_meant_is_told(words, told):
    with pytest.raises(ArgumentError) as error:
        cli.execute(["train", *words])
    assert explained(error.value, "train") == told


def test_what_other_programs_call_an_option_is_one_of_a_run():
    assert (
        set(OTHERS.values()) <= flat(Config().to_dict()).keys() and not OTHERS.keys() & flat(Config().to_dict()).keys()
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            lambda: MemoryTableConfig(methods=["FT-Last", "TinyTL-B", "FT-Last"]),
            "FT-Last is there twice; name it once",
        ),
        (lambda: FitConfig(methods=["FT-Last", "FT-Last"]), "FT-Last is there twice"),
        (lambda: BenchConfig(batch_sizes=[8, 1, 8]), "batch_sizes=.*8 is there twice"),
        (lambda: BenchConfig(train_sizes=[96, 96]), "train_sizes=.*96 is there twice"),
        (lambda: TrainConfig(epochs=10**9), "train.epochs=1000000000: use at most 1,000,000"),
    ],
)
def test_what_would_be_measured_twice_or_never_ends_is_refused(options, told):
    with pytest.raises(TinyTLError, match=told):
        options()
