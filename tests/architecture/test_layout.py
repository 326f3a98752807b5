"""Wings import only what the table allows; importing a module does nothing else."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cs_lm"
FILES = sorted(PACKAGE.rglob("*.py"))
# What a wing may import besides itself. The modules in the package's root that all wings may use:
EVERYWHERE = {"errors", "device"}
_ALL_BELOW = "config storage ops tokenizer models distributed data optim inference evaluation"
_TABLE = {
    "config": "",
    "storage": "",
    "ops": "",
    "tokenizer": "storage",
    "models": "config ops",
    "distributed": "ops",
    "data": "config storage tokenizer",
    "optim": "config ops models",
    "interop": "config storage models tokenizer",
    "inference": "config ops models",
    "evaluation": "config ops models distributed data tokenizer inference",
    "training": _ALL_BELOW,
    "alignment": f"{_ALL_BELOW} training",
    "scaling": f"{_ALL_BELOW} training",
    "reports": "config storage",
    "serving": "config ops models inference tokenizer alignment reports",
    "cli": f"{_ALL_BELOW} interop training alignment scaling reports serving",
}
MAY_IMPORT = {wing: set(others.split()) for wing, others in _TABLE.items()}
# Belongs to no wing: it names the public things of all of them.
FACADE = {"__init__", "__main__", "lecture", *EVERYWHERE}


def imports_of(path: Path) -> list[str]:
    """The modules that a file names in import statements, wherever they stand in it."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the wing"
            modules.append(node.module)
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def wings_of(path: Path) -> set[str]:
    """The wings, and the modules of the root, that a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("cs_lm.")}


def own_wing(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_wings_import_what_the_table_allows(path):
    wing = own_wing(path)
    if wing in FACADE:
        return
    forbidden = wings_of(path) - MAY_IMPORT[wing] - EVERYWHERE - {wing}
    assert not forbidden, f"{wing} may not import {', '.join(sorted(forbidden))}"


def test_the_root_modules_that_all_may_use_import_no_wing():
    for name in EVERYWHERE:
        assert wings_of(PACKAGE / f"{name}.py") <= EVERYWHERE, name


def test_the_root_holds_nothing_else():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= FACADE
    assert {path.parent.name for path in FILES} - {PACKAGE.name} <= set(MAY_IMPORT)


def test_each_wing_says_what_lives_there():
    for wing in {own_wing(path) for path in FILES} - FACADE:
        said = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text("utf-8")))
        for path in (PACKAGE / wing).glob("[!_]*.py"):
            assert path.stem in said, f"{wing}/__init__.py does not name {path.name}"


def test_no_import_cycle():
    graph = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): imports_of(p)
        for p in FILES
        if p.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path, module])}"
        if module in graph and module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_tokenizer_knows_no_torch():
    for path in (PACKAGE / "tokenizer").glob("*.py"):
        assert not [m for m in imports_of(path) if m.split(".")[0] == "torch"], path.name


def test_importing_the_tokenizer_loads_no_torch():
    program = "import sys, cs_lm; cs_lm.BPETokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


TORCH_FREE = ("commands", "train_tokenizer", "tokenizer_report", "encode", "cache")


@pytest.mark.parametrize("command", TORCH_FREE)
def test_commands_on_text_load_no_torch(command):
    """They start in a fraction of a second."""
    program = f"import sys, cs_lm.cli.{command}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_names_say_something():
    assert not {path.stem for path in FILES} & {"utils", "common", "core", "helpers", "misc"}


def text_calls_without_encoding(tree: ast.AST) -> list[int]:
    """Lines of `open`, `read_text`, `write_text` that leave the encoding to the platform."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        is_open = name == "open" and isinstance(node.func, ast.Name)
        if not is_open and name not in {"read_text", "write_text"}:
            continue
        modes = [a.value for a in node.args[1:2] if is_open and isinstance(a, ast.Constant)]
        named = any(keyword.arg == "encoding" for keyword in node.keywords)
        if not named and not any("b" in str(mode) for mode in modes):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_files_name_their_encoding(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {  # cs_lm's own read_text is UTF-8 always
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "read_text"
    }
    assert not [line for line in text_calls_without_encoding(tree) if line not in ours]


def test_a_missing_encoding_is_found():
    assert text_calls_without_encoding(ast.parse("open(p); x.read_text(); open(p, 'w')")) == [1] * 3
    assert not text_calls_without_encoding(ast.parse("open(p, 'rb'); open(p, encoding='utf-8')"))


def test_every_torch_load_is_weights_only():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def names_from_cs_lm(path: Path) -> list[tuple[str, str]]:
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cs_lm")
        for alias in node.names
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_name_things_that_exist(path):
    """They import inside their functions, which nothing else runs."""
    for module, name in names_from_cs_lm(path):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (module, name)


def test_importing_does_nothing(tmp_path):
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if p.name != "__main__.py"
    ]
    if importlib.util.find_spec("triton") is None:
        modules.remove("cs_lm.ops.triton_attention")  # nothing imports it without triton
    program = (
        "import importlib, logging, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch\n"
        "print(logging.getLogger().handlers, torch.cuda.is_initialized(),"
        " 'matplotlib' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split("\n")[-2] == "[] False False"
    assert list(tmp_path.iterdir()) == []


def test_public_names_are_the_same_thing_each_time():
    """A submodule of the same name would take the place of a lazily imported function."""
    import cs_lm

    for name in cs_lm.__all__:
        first = getattr(cs_lm, name)
        assert getattr(cs_lm, name) is first and type(first).__name__ != "module", name


def test_a_run_does_not_import_what_it_does_not_use():
    """Some of torch's parts take as long to import as all the rest."""
    modules = {"sympy", "torch.distributed.fsdp", "scipy", "matplotlib"}
    code = f"import cs_lm.training.language_modeling, sys; print({modules} & {{*sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown
