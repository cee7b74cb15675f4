"""What fits a budget: found by measured steps, within what the training then measures."""

import json
import logging
import os
import re
import resource
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image
from shared import ROOT, run_cli, small_run, write_image
from started_runs import CONTEXT, delta, run

from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.fit import FitConfig
from tinytl_hf.config.network import BackboneConfig, LiteConfig
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.data.images import decode_pixels, decoded_size
from tinytl_hf.data.sets import open_data
from tinytl_hf.device import memory_limit
from tinytl_hf.errors import TinyTLError
from tinytl_hf.lean.native_library import instruction_sets
from tinytl_hf.measure.peak import Peak
from tinytl_hf.train import budget, ranking
from tinytl_hf.train.fit import about_lr, facts_of, fitted_to_backbone, make_families, recommend, say_what_streams
from tinytl_hf.train.fresh_step import FreshStep
from tinytl_hf.train.plans import Plan, families
from tinytl_hf.train.search import BYTES, Budget, DataFacts, Family, search

BLOCKS = 17
SMALL = ["--backbone.weights", "none", "--train.global_batch_size", "8", "--train.threads", "1"]


def fit(dataset, *options):
    return run_cli("fit", "--data.dataset", dataset, *SMALL, *options)


def peak_of(run):
    return json.loads((run / "memory.json").read_text())["rows"][0]["peak"]["total"]


@pytest.mark.slow
def test_the_config_that_is_recommended_trains_in_the_memory_that_was_measured(
    colour_folder, tmp_path, ready_processes
):
    output = tmp_path / "fitted.yaml"
    options = ["--methods", "[FT-Last]", "--train_sizes", "[64]", "--memory_mb", "8", "--output", output]
    done = fit(colour_folder, *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    row = found["rows"][found["recommended"]["row"]]
    # 9 MB of weights do not fit as fp32.
    assert row["int8"] and row["train_size"] == 64 and row["peak"]["total"] <= 8e6
    assert row["process"] > 100e6 and row["epoch_seconds"] > 0
    config = yaml.safe_load(output.read_text())
    assert config["memory"]["budget_mb"] == 8 and config["backbone"]["frozen_weights"] == "int8"
    done = run_cli("train", "--config", output, "--output_dir", tmp_path / "run", "--train.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert peak_of(tmp_path / "run") == pytest.approx(row["peak"]["total"], rel=0.05)
    assert "memory.budget_mb=8: a step with " in done.stderr


def test_a_budget_that_nothing_fits_ends_with_the_least_that_works(colour_folder, ready_processes):
    done = fit(colour_folder, "--methods", "[FT-Last]", "--train_sizes", "[32]", "--memory_mb", "1")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "memory_mb=1: nothing fits; the smallest that works takes" in last
    needs = float(last.partition("works takes ")[2].partition(" MB")[0])
    plan = last.replace(", bf16)", ")")  # where the processor has it
    most = 6 if instruction_sets() else 7  # in int8, 2.2 million weights are 2.2 MB; eager's slices are larger
    assert 2.2 < needs < most and "(FT-Last, 32 px, 1 image a pass, int8)" in plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "fit: no budget; name --memory_mb"),
        (["--memory_mb", "0"], "memory_mb=0.0: use a number above 0"),
        (["--memory_mb", "8", "--output", "fitted.txt"], "output=fitted.txt: name a .yaml file"),
        (["--memory_mb", "8", "--backbone.name", "nothing"], "backbone.name=nothing"),
        (["--memory_mb", "8", "--train_sizes", "[]"], "train_sizes=[]: use sizes"),
        (["--memory_mb", "8", "--train_sizes", "[96, 16]"], " train_sizes=16: mobilenet_v2 reduces an image 32"),
        (
            ["--memory_mb", "8", "--train.mixup", "0.2", "--train.global_batch_size", "15"],
            "train.global_batch_size=15: mixup and cutmix blend pairs; use an even number",
        ),
        (
            ["--memory_mb", "8", "--train.warmup_epochs", "25"],
            "train.warmup_epochs=25.0: use 0 or more, and less than",
        ),
        (["--memory_mb", "8", "--train_sizes", "[96, 4000]"], " train_sizes=4000: use 2048 or less"),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(options, message, colour_folder, monkeypatch):
    monkeypatch.setattr("tinytl_hf.train.fit.memory_limit", lambda: None)
    done = fit(colour_folder, *options)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_file_that_is_there_is_not_replaced(colour_folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    done = fit(colour_folder, "--memory_mb", "8", "--output", tmp_path / "mine.yaml")
    assert done.returncode == 1 and "mine.yaml: it is there; name a new file" in done.stderr
    assert (tmp_path / "mine.yaml").read_text() == "seed: 1\n"


def test_sizes_that_a_backbone_does_not_take_are_left_out_unless_they_are_named(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("tinytl_hf.train.fit.takes", lambda name, network, size: size in (160, 96))
    config = Config(backbone=BackboneConfig("mobilenet_v3_small", "none"))
    options, blocks = fitted_to_backbone(FitConfig(), config)
    assert (options.train_sizes, blocks) == ([160, 96], 11)
    assert "train_sizes: 128, 64 px are left out, as mobilenet_v3_small takes no images of that size" in caplog.text
    named = FitConfig(train_sizes=[64])
    assert fitted_to_backbone(named, config) == (named, 11)
    monkeypatch.setattr("tinytl_hf.train.fit.takes", lambda name, network, size: False)
    assert fitted_to_backbone(FitConfig(), config)[0].train_sizes == [224]


def test_methods_about_blocks_are_left_out_for_a_backbone_without_them(caplog):
    caplog.set_level(logging.INFO)
    config = Config(backbone=BackboneConfig("shufflenet_v2_x0_5", "none"))
    options = FitConfig(methods=["TinyTL-L+B", "FT-Layerwise", "FT-Last"], train_sizes=[64])
    tried = make_families(config, options, 0, {}, Budget(64e6, None, None, 0))
    assert [family.plans[0].method for family in tried] == ["FT-Last"]
    assert "shufflenet_v2_x0_5 has no residual blocks of a kind that is known here: TinyTL-L+B, FT-Lay" in caplog.text
    with pytest.raises(TinyTLError, match="add FT-Last or TinyTL-B"):
        make_families(config, replace(options, methods=["FT-Layerwise"]), 0, {}, Budget(64e6, None, None, 0))


def test_blocks_too_odd_for_lite_residuals_are_left_out_with_the_reason(caplog):
    pytest.importorskip("timm")
    caplog.set_level(logging.INFO)
    config = Config(backbone=BackboneConfig("timm/efficientnet_b1_pruned", "none"))
    options = FitConfig(methods=["TinyTL-L+B", "FT-Last"], train_sizes=[64])
    tried = make_families(config, options, 23, {}, Budget(64e6, None, None, 0))
    ways = [(family.plans[0].method, family.plans[0].trained_blocks) for family in tried]
    assert ways == [("TinyTL-L+B", 4), ("FT-Last", "all")]
    assert "methods: TinyTL-L+B of all blocks is left out: lite.groups=2: must divide the 35 input" in caplog.text
    config = replace(config, trained_blocks=23, lite=LiteConfig(groups=7))
    with pytest.raises(TinyTLError, match=r"^lite\.groups=7: must divide"):
        make_families(config, replace(options, methods=["TinyTL-L+B"]), 23, {}, Budget(64e6, None, None, 0))


# A made-up network, whose steps need no process: what they take has a part that does not grow with the pixels, which
# no first step shows.
WEIGHTS, FIXED = 10_000_000, 3_000_000


def taken(plan):
    trained = {"FT-Full": 2_500_000, "FT-Last": 10_000}.get(plan.method, 500_000)
    kept = 200 if plan.method == "FT-Full" else 10 * plan.share
    dynamic = FIXED + int(kept * plan.batch * plan.train_size**2) * (2 if plan.checkpointing else 4) // 4
    frozen = max(0, WEIGHTS - (BYTES * trained if plan.method == "FT-Full" else 0)) * (0.25 if plan.int8 else 1)
    gradients = BYTES * trained if plan.batch < 32 else 0
    photos = plan.batch * 3 * (2 * plan.train_size) ** 2
    peak = Peak(int(frozen), BYTES * trained, gradients, 2 * BYTES * trained, dynamic, 0, photos)
    speed = 4e6 / plan.train_size**2
    return FreshStep(peak, peak.total + 20_000_000, trained, speed, 2 * speed)


def made_up(options, budget, config=None):
    config = config or Config()
    sizes = tuple(ranking.SIZES)
    facts = {size: DataFacts(1000, 100, 10, (2 * size, 2 * size), 50_000_000) for size in sizes}
    plans = families(config, options, BLOCKS, bf16=False)
    return [Family(each, facts, budget, 32, lambda plan, _: taken(plan)) for each in plans]


def test_the_time_of_a_training_counts_the_test_split_once():
    budget, few = Budget(64e6, None, None, 0), made_up(FitConfig(methods=["FT-Last"]), Budget(64e6, None, None, 0))
    (row,) = search(few, lambda _: 0.0)
    many = made_up(FitConfig(methods=["FT-Last"]), budget)
    for family in many:
        family.facts = {size: replace(facts, evaluated_last=5100) for size, facts in family.facts.items()}
    (with_test,) = search(many, lambda _: 0.0)
    assert with_test.plan == row.plan and row.training(3) == 3 * row.seconds
    assert with_test.training(3) - row.training(3) == pytest.approx(5100 / row.step.eval_images_per_second)


@pytest.mark.parametrize("memory_mb", [8, 16, 32, 64, 128, 512, 8000])
def test_of_each_family_the_best_plan_that_fits_is_found_or_one_as_good_as_nearly_so(memory_mb):
    budget = Budget(memory_mb * 1e6, None, None, 0)
    tried = made_up(FitConfig(), budget)
    found = {(row.plan.method, row.plan.trained_blocks): row for row in search(tried, lambda _: 0.0)}
    assert all(row.step == taken(row.plan) and row.fits(budget) for row in found.values())
    for family in tried:
        fitting = [plan for plan in family.plans if taken(plan).peak.total <= budget.step]
        row = found.get((family.plans[0].method, family.plans[0].trained_blocks))
        assert (row is not None) == bool(fitting), family.plans[0]
        if row is not None:
            assert row.plan.points >= fitting[0].points - 0.5 and len(family.rows) <= 6


def test_a_budget_for_the_process_leaves_room_for_python_the_images_and_what_the_step_needs_besides():
    base = 400_000_000
    budget = Budget(None, 550e6, None, base)
    rows = list(search(made_up(FitConfig(), budget), lambda _: 0.0))
    assert rows
    for row in rows:
        assert row.process == base + 50_000_000 + row.step.grown + row.step.peak.photos <= 550e6


def test_where_the_time_is_short_smaller_images_follow_and_the_best_that_keeps_it_is_recommended():
    def seconds_of(row):
        return 10 * row.seconds

    for seconds, size in ((1e6, 160), (60, 128)):
        budget = Budget(1e9, None, seconds, 0)
        rows = list(search(made_up(FitConfig(methods=["TinyTL-L+B"]), budget), seconds_of))
        rows.sort(key=lambda row: (-row.plan.points, row.seconds))
        row, epochs = recommend(rows, 10, seconds)
        assert (row.plan.train_size, epochs) == (size, 10) and seconds_of(row) <= seconds
    _, epochs = recommend(rows, 10, 3.2 * min(row.seconds for row in rows))
    assert epochs == 3
    with pytest.raises(
        TinyTLError, match=r"minutes=.*: the quickest that fits the memory takes .* minutes for an epoch"
    ):
        recommend(rows, 10, 0.5)


def test_plans_take_group_norm_where_a_pass_has_few_images_and_even_passes_where_pairs_are_blended():
    config = replace(Config(), train=TrainConfig(mixup=0.2))
    for plans in families(config, FitConfig(), BLOCKS, bf16=True):
        method = plans[0].method
        assert all(plan.batch % 2 == 0 and plan.of(config).method == method for plan in plans)
        assert all(plan.points <= plans[0].points for plan in plans)
        if method == "TinyTL-L+B":
            assert all(plan.group_norm == (plan.batch < 8) for plan in plans)
        if method == "FT-Full":
            assert min(plan.batch for plan in plans) == 8  # its batch norms are the backbone's own
            assert any(plan.int8 for plan in plans) == (plans[0].trained_blocks != "all")
    assert not list(families(config, FitConfig(methods=["TinyTL-L+B"]), 0, bf16=False))


def test_the_ranking_prefers_what_was_measured_to_be_better():
    points = [
        ranking.points(method, 1.0, 128, int8=False, group_norm=False)
        for method in ("FT-Full", "TinyTL-L+B", "FT-Last")
    ]
    assert points == sorted(points, reverse=True) and points[1] == 0.0
    assert ranking.points("TinyTL-L+B", 1.0, 128, int8=True, group_norm=False) < 0
    of_few = [ranking.points(name, 6 / 17, 128, int8=False, group_norm=False) for name in ("FT-Full", "TinyTL-L+B")]
    assert of_few[0] == of_few[1] < 0  # a lead with all blocks says nothing of a few
    sizes = [ranking.points("TinyTL-L+B", 1.0, size, int8=False, group_norm=False) for size in (64, 96, 112, 128, 160)]
    assert sizes == sorted(sizes)


def test_the_table_of_the_page_is_that_of_the_code():
    page = (ROOT / "configs" / "README.md").read_text().partition("## How fit ranks")[2].partition("\nCIFAR-10:")[0]
    told = {name.strip("` "): float(value) for name, value in re.findall(r"^\| (.+?) \| ([+-]?[\d.]+) \|", page, re.M)}
    expected = dict(ranking.METHODS)
    expected |= {f"{size} px": gained for size, gained in ranking.SIZES.items() if size != 128}
    expected |= {"the last 10 blocks of 17": ranking.BLOCKS[10], "the last 6 blocks": ranking.BLOCKS[6]}
    expected |= {"the last 3 blocks": ranking.BLOCKS[3], "group norm in lite residuals": ranking.GROUP_NORM}
    expected |= {"int8, with lite residuals": ranking.INT8_WITH_LITE_RESIDUALS, "int8, without": ranking.INT8_WITHOUT}
    assert told == expected


def test_limits_of_control_groups_of_both_versions_are_read_and_the_tightest_counts(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert memory_limit(tmp_path) is None
    write("proc/self/cgroup", "0::/user/run\n")
    write("sys/fs/cgroup/user/run/memory.max", "max\n")
    assert memory_limit(tmp_path) is None
    write("sys/fs/cgroup/user/memory.max", "3000\n")
    write("sys/fs/cgroup/memory.max", "9000\n")
    assert memory_limit(tmp_path) == 3000
    write("proc/self/cgroup", "4:memory:/job\n2:cpu,cpuacct:/job\n")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "2000\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    assert memory_limit(tmp_path) == 2000


def test_images_that_stream_are_said_to_be_decoded_beside_the_figures(colour_folder, caplog):
    facts = {}
    for size, limit in ((64, 2048), (32, 0)):
        config = Config(data=DataConfig(dataset=str(colour_folder), memory_limit_mb=limit))
        facts[size] = facts_of(open_data(config.data), config, size)
    assert [(known.streams, known.in_memory > 0) for known in facts.values()] == [(False, True), (True, False)]
    with caplog.at_level(logging.INFO):
        say_what_streams({64: facts[64]}, 2048)
        assert "decoded in each epoch" not in caplog.text
        say_what_streams(facts, 0)
    assert "at 32 px, the images of a split take more than data.memory_limit_mb=0 and are decoded in" in caplog.text


@pytest.mark.parametrize(("size", "turned"), [((40, 36), 1), ((300, 200), 1), ((300, 200), 6), ((1000, 70), 8)])
def test_the_size_of_a_decoded_photo_is_known_by_its_header(size, turned, tmp_path):
    image = Image.new("RGB", size, "red")
    exif = image.getexif()
    exif[0x0112] = turned
    image.save(tmp_path / "photo.jpg", exif=exif)
    encoded = {"path": str(tmp_path / "photo.jpg"), "bytes": None}
    assert decoded_size(encoded, 32) == decode_pixels(encoded, 32).shape[:2]
    (tmp_path / "photo.jpg").write_bytes(b"none")
    assert decoded_size(encoded, 32) is None


def sgd_run(data, output, *options):
    options = ("--train.optimizer", "sgd", "--train.lr", "1e-2", "--train.epochs", "1", *options)
    return small_run(data, output, "--data.train_size", "64", "--memory.report", "true", *options)


@pytest.mark.parametrize(("processes", "batch", "replayed"), [(1, 8, True), (2, 4, False)])
def test_a_budget_is_of_a_step_whose_passes_go_as_those_of_the_run(
    processes, batch, replayed, colour_folder, monkeypatch
):
    measured = []
    monkeypatch.setattr(budget, "measure_step", lambda config, *_: measured.append(config))
    config = Config(
        method="TinyTL-B",
        data=DataConfig(dataset=str(colour_folder), train_size=32),
        train=TrainConfig(lr=1e-3, epochs=1, global_batch_size=8),
        memory=MemoryConfig(budget_mb=100),
    )
    family = budget._family(config, processes, open_data(config.data))
    assert family.measure(family.plans[0]) is None
    (of_step,) = measured
    assert (of_step.train.global_batch_size, of_step.memory.cuda_graph) == (batch, replayed)


@pytest.mark.slow
def test_a_budget_splits_the_batch_and_a_method_without_batch_statistics_trains_the_same(
    colour_folder, tmp_path, ready_processes
):
    options = ["--method", "TinyTL-B"]
    done = run_cli(*sgd_run(colour_folder, tmp_path / "whole", *options))
    assert done.returncode == 0, done.stderr
    whole = peak_of(tmp_path / "whole")
    budget = (whole - 0.3e6) / 1e6
    done = run_cli(*sgd_run(colour_folder, tmp_path / "split", *options, "--memory.budget_mb", f"{budget:.3f}"))
    assert done.returncode == 0, done.stderr
    steps = yaml.safe_load((tmp_path / "split" / "config.yaml").read_text())["train"]["gradient_accumulation_steps"]
    assert steps > 1 and peak_of(tmp_path / "split") <= budget * 1e6
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("memory.budget_mb")]
    assert f"where a step with 8 images a pass takes {whole / 1e6:.1f} MB" in line and "differs" not in line
    first, second = delta(tmp_path / "whole"), delta(tmp_path / "split")
    for name, tensor in first.items():
        assert np.abs(tensor - second[name]).max() <= 1e-6 * max(1.0, np.abs(tensor).max()), name


@pytest.mark.parametrize("fits", [8, 4, 2, 1])
def test_a_budget_of_just_what_a_step_takes_is_kept_by_that_step(fits):
    plans, measured = [Plan("TinyTL-B", "all", 1.0, 64, batch) for batch in (16, 8, 4, 2, 1)], []

    def take(plan, repeats):  # a step takes 0.5 % less than in proportion, but for the whole batch
        measured.append(plan.batch)
        kept = round((1.0 if plan.batch == 16 else 0.995) * 1e6 * plan.batch)
        return FreshStep(Peak(9_000_000, 0, 0, 0, kept, 0, 0), 0, 0, 1.0, 1.0)

    limit = Budget(take(replace(plans[0], batch=fits), 0).peak.total, None, None, 0)
    family = Family(plans, {64: DataFacts(100, 10, 3, (64, 64), 0)}, limit, 16, take)
    family.measure(plans[0])
    row = family.best(plans) or family.measure(plans[-1])
    found = budget.with_more_images(family, row)
    assert found.plan.batch == fits and found.step.peak.total == limit.step
    assert len(measured) <= 6  # the limit's own, and the whole batch


def test_a_budget_that_one_image_exceeds_ends_before_training_with_what_would_fit(
    colour_folder, tmp_path, ready_processes
):
    options = ["--method", "FT-Last", "--memory.budget_mb", "6"]
    done = run_cli(*small_run(colour_folder, tmp_path / "run", *options))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "memory.budget_mb=6: a step with 1 image a pass takes" in last, done.stderr
    assert "MB takes: FT-Last, 32 px, 8 images a pass, int8" in last and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_split_alike_and_a_resumed_run_goes_on_with_its_split(colour_folder, tmp_path):
    options = ["--method", "TinyTL-B", "--data.train_size", "64", "--memory.report", "true"]
    whole = small_run(colour_folder, tmp_path / "whole", *options, "--train.epochs", "1")
    done = run(whole, tmp_path / "whole.log", processes=2)
    assert done.returncode == 0, done.stderr
    budget = f"{peak_of(tmp_path / 'whole') / 1e6 - 0.1:.3f}"
    split = small_run(colour_folder, tmp_path / "split", *options, "--memory.budget_mb", budget)
    for more in (["--train.epochs", "1"], ["--train.epochs", "2", "--train.resume", "auto"]):
        done = run([*split, *more], tmp_path / f"{len(more)}.log", processes=2)
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load((tmp_path / "split" / "config.yaml").read_text())
        assert config["train"]["gradient_accumulation_steps"] > 1
    assert peak_of(tmp_path / "split") <= 1e6 * float(budget)
    over = [*small_run(colour_folder, tmp_path / "over", *options), "--memory.budget_mb", "1"]
    done = run(over, tmp_path / "over.log", processes=2)
    assert done.returncode == 1 and "memory.budget_mb=1: a step with 1 image a pass takes" in done.stderr


# MB that a process may map beyond what it has once Python and the libraries are there.
ROOM = 900


def _train_within(arguments, log, room):
    """Train in this process, which may take so many MB more than it has."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # in place of what the test runner has there
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room * 1_000_000,) * 2)
    from tinytl_hf.cli import main

    main([str(argument) for argument in arguments])


def train_within(room, log, *arguments):
    process = CONTEXT.Process(target=_train_within, args=(arguments, log, room))
    process.start()
    process.join(300)
    return process.exitcode, log.read_text()


@pytest.mark.slow
def test_within_a_real_limit_stock_full_training_dies_and_what_fit_recommends_ends(tmp_path, ready_processes):
    for i in range(64):
        write_image(tmp_path / "photos" / "train" / "ab"[i % 2] / f"{i}.png", size=(160, 140), seed=i)
    options = ["--backbone.weights", "none", "--train.global_batch_size", "64", "--train.threads", "1"]
    options += ["--data.dataset", tmp_path / "photos", "--data.train_size", "128", "--data.max_eval_samples", "4"]
    output = tmp_path / "fitted.yaml"
    methods = ["--methods", "[FT-Full, TinyTL-B]", "--train_sizes", "[128]"]
    done = run_cli("fit", *options, *methods, "--memory_mb", "64", "--output", output)
    assert done.returncode == 0, done.stderr
    epoch = ["--train.epochs", "1", "--memory.report", "false"]
    full = [*options, *epoch, "--method", "FT-Full", "--memory.lean", "false", "--output_dir", tmp_path / "full"]
    code, told = train_within(ROOM, tmp_path / "full.log", "train", *full)
    assert code != 0 and "allocate memory" in told, told
    fitted = ["--config", output, *epoch, "--memory.budget_mb", "null", "--output_dir", tmp_path / "fitted"]
    code, told = train_within(ROOM, tmp_path / "fitted.log", "train", *fitted)
    assert code == 0, told
    assert (tmp_path / "fitted" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_rate_that_was_set_for_another_method_is_said_to_be_kept():
    set_for = Config(method="TinyTL-L+B", train=TrainConfig(lr=4e-4))
    told = "train.lr=0.0004 is kept, which was set for TinyTL-L+B; --train.lr null takes what suits FT-Last"
    assert about_lr(set_for, "FT-Last") == told
    assert about_lr(set_for, "TinyTL-L+B") == about_lr(Config(), "FT-Last") == ""
    assert about_lr(Config(train=TrainConfig(lr=2e-3)), "TinyTL-B") == ""  # which it suits
