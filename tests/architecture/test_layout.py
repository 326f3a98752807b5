"""Imports go down the floors; files stay readable; importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cs_lm").rglob("*.py"))
# 8 commands, 7 training, 6 its guards and its folder, 5 step, evaluation and decoding, 4 models and
# optimizer, 3 layers and stores, 2 what they are made of, 1 configs, gradients and tokenizer,
# 0 definitions and settings.
FLOORS = {
    "settings": 0, "shared_settings": 0.5, "ops": 0, "device": 0, "whole_file": 0, "recompute": 0, 
    "stop_signals": 0, "compiling": 0, "locks": 0.5, "errors": 0,
    "config": 1, "flags": 1, "manifest": 1, "gradients": 1, "weight_init": 1, "kv_cache": 1,
    "tokenizer": 1,
    "tiled_attention": 2, "language_model": 3.5, "dropout": 2, "counts": 2, "store_writer": 2,
    "checkpoint": 2,
    "fast_ops": 3, "fast_block": 3, "layers": 3, "schedule": 3, "speed": 3, "cache": 3,
    "checkpoint_manager": 3, "token_store": 3,
    "metrics": 3.5, "plots": 4, "model": 4, "gpt2": 4, "optim": 4, "batches": 4, "corpus": 4,
    "prepare": 5, "measure": 6, "build_model": 5, "evaluation": 5, "decoding": 5,
    "training_step": 5,
    "run_folder": 6, "bad_numbers": 6, "reporting": 6.5,
    "weights": 6,
    "train": 7, "init_from": 7, "dry_run": 7,
    "cli": 8,
}  # fmt: skip
MAX_LINES = 400
FACADE = {"__init__", "__main__"}  # names the public things of every floor


def component(module: str) -> str:
    """`cs_lm.tokenizer.bpe` belongs to the component `tokenizer`."""
    return module.split(".")[1]


def imports_of(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            if node.module == "cs_lm":
                modules += [f"cs_lm.{alias.name}" for alias in node.names]
            else:
                modules.append(node.module)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    parts = path.relative_to(ROOT / "cs_lm").with_suffix("").parts
    if parts[0] in FACADE:
        pytest.skip("the package's own face, or its command line, may name every floor")
    for module in imports_of(path):
        if module.startswith("cs_lm.") and component(module) != parts[0]:
            above = FLOORS[component(module)] >= FLOORS[parts[0]]
            assert not above, f"{'/'.join(parts)} imports {module}, which is not on a lower floor"


def test_no_cycle_inside_a_package():
    """Within tokenizer/ and cli/ there are no floors, but still an order."""
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


def test_every_component_has_a_floor():
    found = {p.relative_to(ROOT / "cs_lm").with_suffix("").parts[0] for p in FILES} - FACADE
    assert found == set(FLOORS)


def test_tokenizer_knows_no_torch():
    for path in (ROOT / "cs_lm" / "tokenizer").glob("*.py"):
        assert not [m for m in imports_of(path) if m.split(".")[0] == "torch"], path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_fit_a_head(path):
    assert path.stem not in {"utils", "common", "helpers", "misc"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


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


def test_importing_does_nothing(tmp_path):
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if p.name != "__main__.py"
    ]
    program = (
        "import importlib, logging, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch\n"
        "print(logging.getLogger().handlers, torch.cuda.is_initialized(),"
        " 'matplotlib' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.split("\n")[-2] == "[] False False"
    assert list(tmp_path.iterdir()) == []


def test_public_names_are_the_same_thing_each_time():
    """A submodule of the same name would take the place of a lazily imported function."""
    import cs_lm

    for name in cs_lm.__all__:
        first = getattr(cs_lm, name)
        assert getattr(cs_lm, name) is first and type(first).__name__ != "module", name
