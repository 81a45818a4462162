"""The rules of the house: who imports whom, what importing may do, and that every command we print parses."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

BUDGET, README_BYTES = 10_350, 12_000  # lines of all modules, length of the README
SCRIPTS = {"prepare", "preprocess", "train", "crop", "ensemble", "predict", "report", "features", "export", "app"}
# what a module may import of ours; a script all but scripts
ALLOWED = {"util": (), "fsg": (), "losses": ("scores",), "scores": (), "tasks": ("util", "scores", "losses"),
           "blends": ("scores", "tasks"),
           "calibration": ("util", "scores", "tasks"),
           "plumbing": ("util", "scores", "tasks", "calibration", "fsg", "plumbing"),
           "models": ("util", "tasks", "fsg", "plumbing"),
           "probe": ("util", "tasks", "plumbing", "models"),
           "maps": ("util", "fsg", "plumbing", "models"),
           "places": ("util", "plumbing", "localize", "maps"),
           "inference": ("util", "tasks", "plumbing", "models", "localize", "places", "blends"),
           "dataset": ("util", "tasks", "plumbing"),
           "localize": ("util", "tasks", "plumbing", "models", "maps")}  # fmt: skip
PATHS = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for path in (*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"))}  # fmt: skip
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE = {f"{path.parent.name}/{path.stem}": path for folder in ("benchmarks", "demos", "example_data")
        for path in (ROOT / folder).glob("*.py") if "get_args_parser" in path.read_text()}  # fmt: skip


def python(*words):
    """What a fresh process prints."""
    run = subprocess.run([sys.executable, "-c", *words], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or run.stderr


def imported(tree):
    """Full names that a module imports, anywhere in its code: `from a import b` may mean a.b or a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ({alias.name} for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the graph"
            yield from ({f"{node.module}.{alias.name}", node.module} for alias in node.names)


GRAPH = {name: {max(found & PATHS.keys(), key=len) for found in imported(tree) if found & PATHS.keys()}
         for name, tree in TREES.items()}  # fmt: skip


def test_imports_point_downwards_and_no_script_is_imported():
    assert {name.split(".")[0] for name in PATHS} == SCRIPTS | ALLOWED.keys()
    for name, others in GRAPH.items():
        assert {other.split(".")[0] for other in others} <= set(ALLOWED.get(name.split(".")[0], ALLOWED)), name
    assert {"plumbing.files", "plumbing.arrays"} <= GRAPH["crop"]  # the graph sees into the package
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle
    roots = {name: {word.split(".")[0] for found in imported(tree) for word in found} for name, tree in TREES.items()}
    assert [name for name, found in roots.items() if "albumentations" in found] == ["dataset"]
    assert not set().union(*roots.values()) & {"fcntl", "grp", "pwd", "resource", "termios"}  # which Windows lacks


STATE = """
import importlib, os, signal, sys, warnings
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations, cv2, numpy, pandas, PIL.Image, torch, torchvision, tqdm
def state():
    return {"pixels": PIL.Image.MAX_IMAGE_PIXELS, "opencv": cv2.getNumThreads(), "filters": list(warnings.filters),
            "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "errors": numpy.geterr(),
            "signals": [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], "path": list(sys.path)}
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
print([key for key, value in state().items() if value != before[key]])
"""


def test_importing_changes_nothing_in_other_libraries_and_light_scripts_load_no_heavy_ones():
    assert python(STATE, *sorted(PATHS)) == "[]"
    code = "import sys, util, preprocess, ensemble; print({'torch', 'sklearn', 'matplotlib'} & sys.modules.keys())"
    assert python(code) == "set()"


def test_functions_are_short_and_say_what_they_do():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name}"
                assert ast.get_docstring(node) or node.name[0] == "_" or node.col_offset, f"{name}.{node.name}"


def test_the_house_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in PATHS.values()) <= BUDGET
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_and_typos(name, capsys):
    parser = importlib.import_module(name).get_args_parser()
    for words, status in ((["--help"], 0), (["--devcie", "cpu"], 2), (["--overwri"], 2)):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        assert stop.value.code == status
    assert "usage:" in capsys.readouterr().out


def commands(text):
    """Command lines of our scripts in a text, continuation lines joined and shell variables filled in."""
    text, found = text.replace("\\\n", " "), []
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.M):
        text = text.replace(f"${name}", value)
    for line in text.splitlines():
        if match := re.match(r"^\s*(?:\S*python3?|torchrun(?: --\S+)*)\s+((?:\w+/)?\w+)\.py\b(.*)", line):
            found.append((match[1], shlex.split(match[2], comments=True)))
    return found


def check(found, monkeypatch):
    """Parse command lines as their scripts would."""
    for script, words in found:
        folder, _, name = script.rpartition("/")
        if folder:
            monkeypatch.syspath_prepend(str(ROOT / folder))
        importlib.import_module(name).get_args_parser().parse_args(words)  # pytest shows what argparse says


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_of_the_docs_parse(path, monkeypatch):
    found = commands("".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.S)))
    check(found, monkeypatch)
    assert {script for script, _ in found} >= SCRIPTS or path.name != "README.md"


def test_docstring_commands_parse(monkeypatch):
    assert {name.split("/")[0] for name in MORE} == {"benchmarks", "demos", "example_data"}
    for name, path in (MORE | {name: PATHS[name] for name in SCRIPTS}).items():
        found = commands(ast.get_docstring(ast.parse(path.read_text())))
        assert found, f"{name} shows no command"
        check(found, monkeypatch)


def test_makefile_commands_parse_and_the_readme_names_its_targets(monkeypatch):
    run = subprocess.run(["make", "-n", "demo", "example_weights"], cwd=ROOT, capture_output=True, text=True)
    found = commands(run.stdout)
    assert len(found) >= 9, run.stderr
    check(found, monkeypatch)
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)) <= targets


def test_links_lead_somewhere():
    links = [(path, link) for path in DOCS for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())]
    assert [(path.name, link) for path, link in links if not (path.parent / link).exists()] == []
