"""The house rules: who imports whom, every command in the README and Makefile parses."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

ALLOWED = {
    "util": set(),
    "fsg": set(),
    "localize": set(),
    "preprocess": {"util"},
    "dataset": {"util"},
    "ensemble": {"util"},
    "models": {"fsg"},
    "train": {"util", "dataset", "models", "fsg"},
    "crop": {"util", "dataset", "models", "localize"},
    "predict": {"util", "dataset", "models", "localize"},
    "audit": {"util", "dataset", "models", "ensemble"},
}
SCRIPTS = ["preprocess", "train", "crop", "ensemble", "predict", "audit"]


def imports(name):
    """Local modules that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found & ALLOWED.keys()


def test_modules_are_those_of_the_plan():
    assert {path.stem for path in ROOT.glob("*.py")} == ALLOWED.keys()


@pytest.mark.parametrize("name", ALLOWED)
def test_imports(name):
    assert imports(name) <= ALLOWED[name]


@pytest.mark.parametrize("name", ["util", "preprocess", "ensemble"])
def test_light_scripts_load_no_torch_and_no_sklearn(name):
    code = f"import sys, {name}; print({{'torch', 'sklearn', 'matplotlib'}} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


@pytest.mark.parametrize("name", ALLOWED)
def test_no_function_is_longer_than_a_screen(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"
            if not node.name.startswith("_") and node.col_offset == 0:
                assert ast.get_docstring(node), f"{name}.{node.name} says nothing of itself"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_typos(name, capsys):
    parser = __import__(name).get_args_parser()
    parser.prog = f"{name}.py"
    for words, status in ((["--help"], 0), (["--devcie", "cpu"], 2), (["--overwri"], 2)):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        assert stop.value.code == status
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model", "resnet", "--lr", "-1"],
        ["train", "--model", "resnet", "--dropout", "1.5"],
        ["train", "--model", "resnet", "--epochs", "0"],
        ["train", "--model", "resnet", "--workers", "two"],
        ["preprocess", "--n_folds", "1"],
        ["crop", "--views", "3"],
        ["ensemble", "median"],
    ],
)
def test_values_out_of_range(words, capsys):
    with pytest.raises(SystemExit) as stop:
        __import__(words[0]).get_args_parser().parse_args(words[1:])
    assert stop.value.code == 2
    assert words[-1] in capsys.readouterr().err


def commands(text):
    """Command lines of our scripts in a text, continuation lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        match = re.match(r"^\s*(?:\S*python3?)\s+((?:\w+/)?\w+)\.py\b(.*)", line)
        if match:
            words = shlex.split(match[2], comments=True)
            found.append((match[1], words))
    return found


def check(script, words):
    """Parse a command line as the script would."""
    if "/" in script:
        folder, script = script.split("/")
        sys.path.insert(0, str(ROOT / folder))
    __import__(script).get_args_parser().parse_args(words)


def readme_commands():
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [command for block in blocks for command in commands(block)]


def test_readme_commands_parse():
    found = readme_commands()
    assert {script for script, _ in found} >= set(SCRIPTS)
    for script, words in found:
        check(script, words)


def test_docstring_commands_parse():
    more = [path for folder in ("benchmarks", "demos") for path in (ROOT / folder).glob("*.py")]
    with_commands = [path for path in more if "get_args_parser" in path.read_text()]
    assert len(with_commands) >= 8
    for name in [*SCRIPTS, *(f"{path.parent.name}/{path.stem}" for path in with_commands)]:
        found = commands(ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())))
        assert found, name
        for script, words in found:
            check(script, words)


@pytest.mark.parametrize("target", ["demo", "example_weights"])
def test_makefile_commands_parse(target):
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = commands(run.stdout)
    assert len(found) >= 2
    for script, words in found:
        check(script, words)


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= named <= targets


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
