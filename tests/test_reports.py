"""``compare`` and ``report`` on the folders of real runs, and on copies of them that were changed."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image
from shared import run_cli, small_run

from tinytl_hf import TinyTLError
from tinytl_hf.reports.compare import Comparison, _pictures
from tinytl_hf.reports.finished_run import read_run
from tinytl_hf.reports.page import render

PEAK = {"frozen_weights": 9, "trained_weights": 1, "gradients": 1, "optimizer_state": 2, "kept_activations": 4}


def edit(path, **changes):
    """Change some values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def measured(method, peak):
    rows = [
        {"method": method, "engine": engine, "peak": {**PEAK, "transient": 3, "total": total}}
        for engine, total in (("stock", 9 * peak), ("lean", peak))
    ]
    return json.dumps({"unit": "bytes", "conditions": {"batch_size": 8, "device": "cpu"}, "rows": rows})


@pytest.fixture(scope="module")
def one_run(colour_folder, tmp_path_factory):
    """A real run of two epochs on blue and red images."""
    output = tmp_path_factory.mktemp("reports") / "last"
    done = run_cli(
        *small_run(colour_folder, output, "--method", "FT-Last", "--train.lr", "1e-6", "--memory.report", "false")
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def runs(one_run, tmp_path):
    """Three seeds of one method, and one of another that was measured."""
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        folder = shutil.copytree(one_run, tmp_path / f"last{seed}")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed, "output_dir": str(folder)}))
        edit(folder / "eval_results.json", accuracy=accuracy)
    bias = shutil.copytree(one_run, tmp_path / "bias")
    config = yaml.safe_load((bias / "config.yaml").read_text())
    (bias / "config.yaml").write_text(yaml.safe_dump({**config, "method": "TinyTL-B"}))
    (bias / "memory.json").write_text(measured("TinyTL-B", 5_500_000))
    return tmp_path


def test_a_run_leaves_its_counts_and_its_mistakes(one_run):
    results = json.loads((one_run / "eval_results.json").read_text())
    assert results["trained_parameters"] == 2 * 1280 + 2
    mistakes = json.loads((one_run / "mistakes.json").read_text())
    assert mistakes["n"] == 10 and mistakes["wrong"] == round(10 * (1 - results["accuracy"])) == len(mistakes["shown"])
    assert mistakes["wrong"] > 0
    for mistake in mistakes["shown"]:
        assert mistake["label"] != mistake["answer"] and mistake["probability"] >= mistake["probability_of_label"]
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(mistake["png"])))).mean((0, 1))
        assert ("blue", "red")[mistake["label"]] == ("red" if image[0] > image[2] else "blue")
        assert mistake["label"] == mistake["index"] // 5  # five blue ones, then five red ones
    confidence = [mistake["probability"] for mistake in mistakes["shown"]]
    assert confidence == sorted(confidence, reverse=True)


def test_compare_puts_seeds_together_and_methods_apart(runs, tmp_path):
    output = tmp_path / "out"
    done = run_cli("compare", *sorted(runs.iterdir()), "--output", output)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.search(r"^FT-Last +2,562 +0\.01 +60\.00 ± 10\.00 +3 +- +- ", lines[2])
    assert re.search(r"^TinyTL-B +2,562 +0\.01 +[\d.]+ +1 +5\.5 +49\.5 ", lines[1])
    assert "peak of one training step measured with: batch_size 8, device cpu" in done.stdout

    bias, last = json.loads((output / "compare.json").read_text())["rows"]
    assert last["accuracy"] == pytest.approx(0.6) and last["accuracy_std"] == pytest.approx(0.1)
    assert last["peak_mb"] is None and bias["peak_mb"] == 5.5 and bias["accuracy_std"] is None
    (first, second) = csv.DictReader((output / "compare.csv").read_text().splitlines())
    assert float(second["accuracy"]) == last["accuracy"] and first["name"] == "TinyTL-B"
    assert "| FT-Last | 2,562 | 0.01 | 60.00 ± 10.00 | 3 | - | - |" in (output / "compare.md").read_text()
    pictures = {path.name for path in output.glob("*.png")}
    assert {"curves.png", "accuracy_memory.png"} < pictures and len(pictures) == 4
    assert all(Image.open(output / name).width > 500 for name in pictures)


@pytest.mark.slow
def test_the_curves_of_a_row_are_the_mean_over_its_seeds(runs, tmp_path):
    def levels(folder, *accuracies):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line, accuracy in zip(lines, accuracies, strict=True):
            figures = {"accuracy": accuracy, "loss": 1 - accuracy}
            line["train"] |= figures
            line["eval"] |= figures
            line["train_curve"] = {key: [value] * 3 for key, value in figures.items()}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def curves(*folders):
        assert run_cli("compare", *folders, "--output", tmp_path / "out").returncode == 0
        return np.asarray(Image.open(tmp_path / "out" / "curves.png"))

    low, high, middle = (runs / f"last{seed}" for seed in range(3))
    levels(low, 0.25, 0.5)
    levels(high, 0.75, 1.0)
    levels(middle, 0.5, 0.75)
    assert (curves(low, high) == curves(middle)).all()
    assert (curves(low, middle) != curves(middle)).any()


def test_compare_says_what_sets_rows_of_a_method_apart_and_what_else_differs(runs):
    folder = runs / "last1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["lr"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = run_cli("compare", runs / "last0", folder).stdout.splitlines()
    assert lines[1].startswith("FT-Last, train.lr 1e-06  ") and lines[2].startswith("FT-Last, train.lr 0.5  ")
    assert "rows differ in train.lr: 1e-06 / 0.5" in lines


def test_one_data_set_and_one_file_of_weights_is_a_row_however_they_are_spelled(runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "w.pth").touch()
    (runs / "data").mkdir()
    spelled = zip(("data", "./data/", runs / "data"), ("w.pth", "./w.pth", runs / "w.pth"), strict=True)
    for seed, (data, weights) in enumerate(spelled):
        config = yaml.safe_load((runs / f"last{seed}" / "config.yaml").read_text())
        config["data"]["dataset"], config["backbone"]["weights"] = str(data), str(weights)
        (runs / f"last{seed}" / "config.yaml").write_text(yaml.safe_dump(config))
    lines = run_cli("compare", "last0", "last1", "last2").stdout.splitlines()
    assert re.search(r"^FT-Last +2,562 +0\.01 +60\.00 ± 10\.00 +3 ", lines[1]) and not lines[2]


def test_compare_leaves_out_what_is_no_finished_run_and_names_it(runs):
    (runs / "empty").mkdir()
    (runs / "last0" / "eval_results.json").unlink()
    (runs / "last1" / "eval_results.json").write_text("{")
    (runs / "last2" / "metrics.jsonl").write_text("")
    done = run_cli("compare", *sorted(runs.iterdir()), runs / "lost")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[:2]] == ["method", "TinyTL-B"]
    for name, reason in [
        ("empty", "is no run: it has no config.yaml"),
        ("lost", "is no run"),
        ("last0", "is not finished: it has no eval_results.json; go on with --train.resume auto"),
        ("last1", "is damaged: eval_results.json: Expecting"),
        ("last2", "is damaged: metrics.jsonl has no line"),
    ]:
        assert f"left out: {runs / name} {reason}" in done.stderr
    done = run_cli("compare", runs / "empty")
    assert done.returncode == 1 and "no finished run among them" in done.stderr and "Traceback" not in done.stderr


def test_a_run_with_an_option_that_others_lack_is_a_row_of_its_own(runs):
    """As one of a later version has."""
    config = runs / "last1" / "config.yaml"
    config.write_text(config.read_text() + "\nlater:\n  option: 5\n")
    for names in (("last0", "last1"), ("last1", "last0")):
        done = run_cli("compare", *(runs / name for name in names))
        assert done.returncode == 0 and rows(done.stdout) == 2, done.stderr
        assert "FT-Last, later.option 5" in done.stdout and "rows differ in later.option: " in done.stdout


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("eval_results.json", {"label_names": ["blue", None]}, "eval_results.json: label_names is no list of names"),
        (
            "eval_results.json",
            {"label_names": ["blue"]},
            "eval_results.json: confusion_matrix has not a row and a column",
        ),
        ("eval_results.json", {"trained_parameters": "many"}, "eval_results.json: trained_parameters is no number"),
        ("eval_results.json", {"balanced_accuracy": None}, "eval_results.json: balanced_accuracy is no number"),
        ("eval_results.json", {"per_class_accuracy": None}, "eval_results.json: per_class_accuracy is no list"),
        ("eval_results.json", {"label_names": []}, "eval_results.json: label_names is no list of names"),
        ("eval_results.json", {"evaluate_f1": "0.5"}, "eval_results.json: evaluate_f1 is no number"),
        ("eval_results.json", {"n": 10**400}, "int too large to convert to float"),
        ("memory.json", {"conditions": []}, "memory.json: conditions is no mapping"),
        ("memory.json", {"rows": None}, "'NoneType' object is not iterable"),
    ],
)
def test_a_damaged_run_is_left_out_with_the_file_and_what_is_wrong_in_it(file, changes, reason, runs):
    edit(runs / "bias" / file, **changes)
    done = run_cli("compare", runs / "last0", runs / "bias")
    assert done.returncode == 0 and f"left out: {runs / 'bias'} is damaged: {reason}" in done.stderr
    for words in ((), ("--html",)):
        done = run_cli("report", runs / "bias", *words)
        assert done.returncode == 1 and f"{runs / 'bias'} is damaged: {reason}" in done.stderr


def test_a_page_says_what_is_damaged_that_it_alone_needs(runs):
    mistakes = runs / "last0" / "mistakes.json"
    known = json.loads(mistakes.read_text())
    for damaged in ([1], {**known, "n": None}, {**known, "shown": [{}]}, {"wrong": 1, "n": 2}):
        mistakes.write_text(json.dumps(damaged))
        done = run_cli("report", runs / "last0", "--html")
        assert done.returncode == 1 and f"{mistakes} is damaged: " in done.stderr and "unexpected" not in done.stderr
    mistakes.unlink()
    edit(runs / "last0" / "eval_results.json", per_class_accuracy=[1.0])
    done = run_cli("report", runs / "last0", "--html")
    assert done.returncode == 1 and "is damaged: eval_results.json has not an accuracy for each" in done.stderr


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_of_a_run_needs_no_data_and_loads_nothing(runs):
    done = run_cli("report", runs / "bias", "--html")
    assert done.returncode == 0, done.stderr
    page = Page((runs / "bias" / "report.html").read_text())
    mistakes = json.loads((runs / "bias" / "mistakes.json").read_text())["shown"]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3 + len(mistakes)
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert picture.width >= 32
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert not any("http:" in str(values) or "https:" in str(values) for _, values in page.tags)
    text = " ".join(" ".join(page.text).split())
    assert "TinyTL-B on mobilenet_v2" in text and "5.5 MB" in text and "train.lr 1e-06" in text


def test_what_users_wrote_is_text_in_the_page(runs):
    evil = '<script>alert("1")</script>'
    folder = runs / "last0"
    edit(folder / "eval_results.json", label_names=[evil, "$red & blue"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["dataset"] = "<img src=x onerror=alert(1)>"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_cli("report", folder, "--html", "--output", runs / "deep" / "page.html")
    assert done.returncode == 0, done.stderr
    html = (runs / "deep" / "page.html").read_text()
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and not any("onerror" in values for _, values in page.tags)
    assert evil in page.text and "<img src=x onerror=alert(1)>" in page.text and "<script" not in html


def test_the_page_does_without_mistakes_and_memory_and_names_a_run_that_is_none(runs):
    (runs / "last0" / "mistakes.json").unlink()
    assert run_cli("report", runs / "last0", "--html").returncode == 0
    text = (runs / "last0" / "report.html").read_text()
    assert "has no mistakes.json" in text and "Not measured in this run" in text
    done = run_cli("report", runs, "--html")
    assert done.returncode == 1 and f"{runs} is no run" in done.stderr
    assert "FT-Last" in run_cli("report", runs / "last0").stdout


def test_runs_of_other_classes_are_rows_of_their_own(runs, tmp_path):
    results = runs / "last1" / "eval_results.json"
    edit(results, label_names=["blue", "green", "red"], confusion_matrix=[[1, 0, 0]] * 3)
    done = run_cli("compare", *(runs / f"last{seed}" for seed in range(3)), "--output", tmp_path / "out")
    assert done.returncode == 0 and "FT-Last, classes 3 (blue, green, red)" in done.stdout, done.stderr


def test_a_file_of_mine_is_not_replaced_and_one_of_ours_is(runs, one_run, tmp_path):
    run, mine = runs / "bias", b"mine, not to be lost, and not UTF-8: \xff"
    outputs = {
        "eval": (["eval", "--adapter", one_run], "output", "figures.json"),
        "report": (["report", run, "--html"], "output", "page.html"),
        "compare.json": (["compare", run], "output", "compare.json"),
        "compare.csv": (["compare", run], "output", "compare.csv"),
        "compare.md": (["compare", run], "output", "compare.md"),
        "curves": (["compare", run], "output", "curves.png"),
        "confusion": (["compare", run], "output", "confusion_TinyTL-B.png"),
    }
    for name, (words, option, file) in outputs.items():
        path = tmp_path / name / file
        path.parent.mkdir()
        target = path.parent if words[0] == "compare" else path
        path.write_bytes(mine)
        done = run_cli(*words, f"--{option}", target)
        assert (
            done.returncode == 1 and f"{option}={path}: is there, and was not written by this command" in done.stderr
        )
        assert path.read_bytes() == mine and len(list(path.parent.iterdir())) == 1
        path.unlink()
        if words[0] != "compare":
            for _ in range(2):
                done = run_cli(*words, f"--{option}", target)
                assert done.returncode == 0 and path.read_bytes() != mine, done.stderr
    for _ in range(2):  # it writes all of its files
        done = run_cli("compare", run, "--output", tmp_path / "all")
        assert done.returncode == 0, done.stderr
        for words, _, file in outputs.values():
            assert words[0] != "compare" or (tmp_path / "all" / file).read_bytes() != mine


def test_a_run_counts_once_and_one_of_other_images_or_in_another_precision_is_no_seed(runs, monkeypatch):
    monkeypatch.chdir(runs)
    run = runs / "last0"
    (runs / "link").symlink_to(run)
    assert rows(run_cli("compare", "last0", "last0/", "./last0", run, "link").stdout) == 1
    assert rows(run_cli("compare", *(runs / f"last{seed}" for seed in range(3))).stdout) == 1
    edit(runs / "last1" / "eval_results.json", precision="bf16")
    edit(runs / "last2" / "eval_results.json", n=4, sha256="0" * 64)
    done = run_cli("compare", *(runs / f"last{seed}" for seed in range(3)))
    assert rows(done.stdout) == 3 and "precision bf16" in done.stdout and "images 4 (00000000)" in done.stdout


def test_the_results_of_a_run_are_not_those_of_an_evaluation(one_run):
    for file in (one_run / "eval_results.json", one_run / "adapter" / "eval_results.json"):
        before = file.read_bytes()
        done = run_cli("eval", "--adapter", one_run, "--output", file)
        assert done.returncode == 1 and f"output={file}: holds the results of a run" in done.stderr
        assert file.read_bytes() == before


def test_a_page_that_is_named_is_written(one_run, tmp_path):
    assert run_cli("report", one_run, "--output", tmp_path / "page.html").returncode == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_an_evaluation_at_another_size_is_that_of_eval_size(one_run):
    done = run_cli("eval", "--adapter", one_run, "--data.train_size", "64")
    assert done.returncode == 1 and "the adapter was trained at 32 px" in done.stderr
    assert run_cli("eval", "--adapter", one_run, "--data.eval_size", "64").returncode == 0


def test_two_runs_of_one_seed_are_said_to_be(runs):
    shutil.copytree(runs / "last0", runs / "again")
    done = run_cli("compare", runs / "last0", runs / "last1", runs / "again")
    assert "FT-Last: 3 runs of 2 seeds, 0 / 1" in done.stdout.replace("0 / 1 / 0", "0 / 1")


def test_where_the_curves_of_runs_that_patience_ended_stop_is_said(runs):
    assert "epochs; curves" not in run_cli("compare", runs / "last0", runs / "last1").stdout
    metrics = runs / "last1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    done = run_cli("compare", runs / "last0", runs / "last1")
    assert "FT-Last: runs of 1 to 2 epochs; curves show the first 1, which all have" in done.stdout


def rows(table):
    return len(table.split("\n\n")[0].splitlines()) - 1


def test_pictures_of_rows_with_long_and_like_names_have_files_of_their_own(runs):
    for number, name in enumerate(("x/y", "x y", "z" * 300)):
        config = yaml.safe_load((runs / f"last{number}" / "config.yaml").read_text())
        config["data"]["dataset"] = f"/d/{name}"
        (runs / f"last{number}" / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_cli("compare", *(runs / f"last{seed}" for seed in range(3)), "--output", runs / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((runs / "out").glob("confusion_*.png"))) == 3


def test_folders_with_spaces_can_be_told_apart_in_the_table(runs, tmp_path):
    names = sorted(folder for folder in runs.iterdir() if read_run(folder).method == "FT-Last")
    places = [shutil.copytree(run, tmp_path / f"my {number}") for number, run in enumerate(names)]
    assert run_cli("compare", *places, "--output", tmp_path / "out").returncode == 0
    (row,) = csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines())
    assert len(places) > 1 and shlex.split(row["runs"]) == [str(place) for place in places]


def test_a_picture_keeps_its_name_beside_one_whose_name_is_longer():
    names = ["TinyTL-L+B", "TinyTL-L", "a b", "a/b", "a_b_2"]
    files = ["TinyTL-L+B", "TinyTL-L", "a_b", "a_b_2", "a_b_2_2"]
    assert list(_pictures(names).values()) == [f"confusion_{file}.png" for file in files]


def test_names_of_classes_reach_no_terminal_as_they_are(runs):
    edit(runs / "last0" / "eval_results.json", label_names=["\x1b[31mred", "two\nlines"])
    done = run_cli("compare", runs / "last0", runs / "last1")
    assert done.returncode == 0 and "\x1b" not in done.stdout and rows(done.stdout) == 2


def test_memory_says_at_its_start_that_a_picture_of_mine_is_there(tmp_path):
    mine = tmp_path / "bars.png"
    Image.new("RGB", (2, 2)).save(mine)
    before = mine.read_bytes()
    done = run_cli("memory", "--plot", mine, "--backbone.weights", "none")
    assert done.returncode == 1 and f"plot={mine}: is there, and was not written by this command" in done.stderr
    assert mine.read_bytes() == before


def test_runs_of_one_seed_have_no_spread_over_seeds(runs):
    for number in (1, 2):
        config = yaml.safe_load((runs / f"last{number}" / "config.yaml").read_text())
        (runs / f"last{number}" / "config.yaml").write_text(yaml.safe_dump({**config, "seed": number // 2}))
    read = [read_run(runs / f"last{number}") for number in range(3)]
    accuracies = [run.results["accuracy"] for run in read]
    (row,) = Comparison(read[:2]).rows  # both of seed 0
    assert row.seeds == 1 and row.accuracy_std is None and row.accuracy == pytest.approx(np.mean(accuracies[:2]))
    assert "2 runs of 1 seed, 0" in str(Comparison(read[:2]))
    (row,) = Comparison(read).rows
    of_seeds = [np.mean(accuracies[:2]), accuracies[2]]
    assert row.accuracy == pytest.approx(np.mean(of_seeds)) and row.accuracy_std == pytest.approx(
        np.std(of_seeds, ddof=1)
    )


@pytest.mark.parametrize(
    ("file", "figure", "value"),
    [
        ("eval_results.json", "accuracy", float("nan")),
        ("eval_results.json", "ece", float("inf")),
        ("metrics.jsonl", "seconds", float("nan")),
        ("metrics.jsonl", "of_epochs", [2]),
        ("metrics.jsonl", "loss", float("-inf")),
    ],
)
def test_what_is_no_number_is_no_figure(file, figure, value, runs):
    path = runs / "last0" / file
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (lines[0]["eval"] if figure == "loss" else lines[0])[figure] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TinyTLError, match=f"is damaged: {file}: {figure} is no number"):
        read_run(runs / "last0")


def test_epochs_that_took_no_time_are_damaged(runs):
    path = runs / "last0" / "metrics.jsonl"
    lines = [json.loads(line) | {"seconds": 0.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TinyTLError, match=r"is damaged: metrics.jsonl: its epochs took no time"):
        read_run(runs / "last0")


@pytest.mark.parametrize(("lines", "patience"), [(slice(1, None), None), (slice(0, 1), None), (slice(1, None), 5)])
def test_lines_that_are_lost_are_said_to_be(lines, patience, runs):
    run, whole = runs / "last0", read_run(runs / "last0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["patience"] = patience
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert whole.what_is_missing == "" and "lacks" not in str(Comparison([whole]))
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[lines]
    (run / "metrics.jsonl").write_text("".join(kept))
    told = "metrics.jsonl lacks 1 of 2 epochs; curves, images/s and training time are of the rest"
    assert f"{run}: {told}" in str(Comparison([read_run(run)])) and told in render(read_run(run))


def test_an_option_of_another_type_in_a_config_is_no_path(runs):
    config = yaml.safe_load((runs / "last0" / "config.yaml").read_text())
    config["data"]["dataset"] = 5
    (runs / "last0" / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(Comparison([read_run(runs / "last0"), read_run(runs / "last1")]).rows) == 2


@pytest.mark.parametrize("file", ["eval_results.json", "memory.json", "metrics.jsonl", "config.yaml", "mistakes.json"])
def test_a_file_that_is_nested_too_deeply_is_damaged(file, runs):
    (runs / "bias" / file).write_text(f"{'a: ' * (file == 'config.yaml')}{'[' * 100_000}\n")
    done = run_cli("report", runs / "bias", "--html")
    assert done.returncode == 1 and "is damaged: " in done.stderr and "unexpected" not in done.stderr, done.stderr
    assert file in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("line", ["[]", "3", '{"epoch": 1}', '{"epoch": 1, "seconds": 1, "train": [], "eval": 2}'])
def test_lines_of_other_things_are_damaged(line, runs):
    (runs / "bias" / "metrics.jsonl").write_text(f"{line}\n")
    done = run_cli("compare", runs / "bias")
    assert done.returncode == 1 and f"{runs / 'bias'} is damaged: " in done.stderr and "unexpected" not in done.stderr


def test_what_a_config_or_a_table_of_memory_can_say_besides_ends_no_page(runs):
    text = (runs / "bias" / "config.yaml").read_text()
    for seed in ("[1]", "!!set {a}", "2020-01-01", "!!timestamp 2020-01-01", "!!binary aGk="):
        (runs / "bias" / "config.yaml").write_text(re.sub("(?m)^seed: .*$", f"seed: {seed}", text))
        for words in (("compare", runs / "bias", runs / "last0"), ("report", runs / "bias", "--html")):
            done = run_cli(*words)
            assert done.returncode == 0, done.stderr
    row = {"method": "TinyTL-B", "engine": "lean", "peak": {"total": 5, "nothing known": 5}}
    edit(runs / "bias" / "memory.json", rows=[row], conditions={})
    assert run_cli("report", runs / "bias", "--html").returncode == 0
    mistake = json.loads((runs / "bias" / "mistakes.json").read_text())["shown"][0]
    edit(runs / "bias" / "mistakes.json", shown=[{**mistake, "probability": "0.5"}])
    done = run_cli("report", runs / "bias", "--html")
    assert done.returncode == 1 and "mistakes.json is damaged: " in done.stderr and "unexpected" not in done.stderr
