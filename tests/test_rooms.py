"""The order of the package's rooms: imports go down only, and within a room there is no circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinytl_hf

PACKAGE = Path(tinytl_hf.__file__).parent
# From the bottom up; a room may import what stands in a line above its own.
ORDER = (
    ("errors", "words", "version", "disk", "device"),
    ("config",),
    ("data", "network", "reports"),
    ("lean", "adapter"),
    ("hub",),
    ("model",),
    ("step",),
    ("cuda_graph",),
    ("measure",),
    ("deploy",),
    ("train",),
    ("commands",),
    ("explained",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LONGEST_FILE = 400


def imports(path):
    """The package's modules that a file imports, anywhere in it, but for what is there for type checkers alone."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    for_types = {n for node in nodes if _is_type_checking(node) for n in ast.walk(node)}
    for node in nodes:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("tinytl_hf"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinytl_hf"):
            for name in node.names:
                module = f"{node.module}.{name.name}"
                yield module if is_module(module) else node.module


def _is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_module(name):
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def module_of(path):
    return ".".join(("tinytl_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
GRAPH = {module: set(imports(path)) for module, path in FILES.items()}


def room(module):
    return module.split(".")[1]


def test_the_rooms_are_those_of_the_order():
    assert {room(module) for module in FILES if "." in module} == {*LEVEL, "__main__"}


@pytest.mark.parametrize("module", [module for module in FILES if module not in ("tinytl_hf", "tinytl_hf.__main__")])
def test_no_import_goes_up_and_none_to_a_room_beside(module):
    own = LEVEL[room(module)]
    for target in GRAPH[module]:
        if target == "tinytl_hf" or room(target) == room(module):
            continue
        bottom = own == 0 and LEVEL[room(target)] == 0  # the small files at the bottom may know one another
        assert LEVEL[room(target)] < own or bottom, f"{module} imports {target}"


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module in done or module not in GRAPH:
            return
        path.append(module)
        for target in sorted(GRAPH[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in GRAPH:
        visit(module)


def test_reports_read_files_and_know_no_torch():
    code = (
        "import sys, tinytl_hf.reports.page, tinytl_hf.reports.compare, tinytl_hf.reports.plots\n"
        "sys.exit(str({'torch', 'torchvision', 'accelerate', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_help_and_the_package_itself_need_no_torch():
    code = (
        "import sys, tinytl_hf, tinytl_hf.cli\n"
        "try: tinytl_hf.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "False" and "--data.train_size" in done.stdout


# Extras, and what draws and renders: a run, or a package that lacks an extra, is not to wait for them at the start.
WHERE_NEEDED = {"matplotlib", "timm", "onnx", "onnxruntime", "onnxscript", "executorch", "tensorboard", "wandb"}


def test_packages_of_some_uses_are_imported_where_they_are_needed():
    for module in FILES.keys() - {"tinytl_hf.deploy.timm_repo"}:  # which is imported for that format alone
        for node in ast.parse(FILES[module].read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & WHERE_NEEDED, module


def test_no_file_is_longer_than_a_person_reads():
    paths = [path for suffix in ("py", "c", "h") for path in PACKAGE.rglob(f"*.{suffix}")]
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in paths}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}
    assert "lean/native/chain.h" in lengths
