"""Every part is written by hand: the library may use torch's tensor operations, not its layers.

The list of what is allowed stands here once; the tests walk the syntax trees.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "cs_lm").rglob("*.py")), ROOT / "run_clm.py"]
# `selfcheck` compares with torch's own versions: that is all it does.
COMPARES_WITH_TORCH = {"cs_lm/cli/selfcheck.py"}

FORBIDDEN_MODULES = (
    "torch.nn.functional",
    "torch.nn.init",
    "torch.nn.utils",
    "torch.nn.modules",
    "torch.utils.data",
    "torch.optim.lr_scheduler",
    "torch.ops",
)
ALLOWED_CONTAINERS = {
    "torch.nn": {"Module", "Parameter", "ModuleList"},
    "torch.optim": {"Optimizer"},
}
FORBIDDEN_OPERATIONS = {
    "softmax",
    "log_softmax",
    "layer_norm",
    "rms_norm",
    "native_layer_norm",
    "batch_norm",
    "group_norm",
    "embedding",
    "dropout",
    "gelu",
    "silu",
    "relu",
    "relu_",
    "elu",
    "leaky_relu",
    "scaled_dot_product_attention",
    "cross_entropy",
    "cross_entropy_loss",
    "nll_loss",
    "linear",
    "multi_head_attention_forward",
    "clip_grad_norm_",
    "feature_dropout",
    "alpha_dropout",
    "_softmax",
    "_log_softmax",
    "softplus",
    "celu",
    "selu",
    "prelu",
    "bilinear",
}
# Our own operations have the field's names too: they are reached through these.
OUR_RECORDS = {"ops", "reference", "CLEAR", "FAST", "record", "gradients"}


def dotted(node: ast.AST) -> str:
    """`torch.nn.functional` for the expression of that spelling, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> full dotted name, for every import."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def why_forbidden(full_name: str) -> str | None:
    for module in FORBIDDEN_MODULES:
        if f"{full_name}.".startswith(f"{module}."):
            return full_name
    parent, _, name = full_name.rpartition(".")
    if name not in ALLOWED_CONTAINERS.get(parent, {name}) and name[:1].isalpha():
        return full_name
    return full_name if parent == "torch" and name in FORBIDDEN_OPERATIONS else None


def violations(source: str) -> list[str]:
    tree = ast.parse(source)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [why_forbidden(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [why_forbidden(f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            full = f"{names.get(first, first)}.{rest}" if rest else ""
            found.append(why_forbidden(full) if full.startswith("torch.") else None)
            owner = getattr(node.value, "attr", getattr(node.value, "id", None))
            if node.attr in FORBIDDEN_OPERATIONS and owner not in OUR_RECORDS:
                found.append(f"method .{node.attr}")
    return [name for name in found if name]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_library_is_pure(path):
    if path.relative_to(ROOT).as_posix() in COMPARES_WITH_TORCH:
        pytest.skip("compares with torch's own versions")
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.nn.functional as F",
        "from torch.nn import functional",
        "from torch import nn; nn.functional.gelu",
        "import torch; torch.nn.Linear(1, 2)",
        "from torch import nn; nn.init.normal_(x)",
        "from torch.nn import LayerNorm",
        "from torch.nn.utils import clip_grad_norm_",
        "import torch; torch.softmax(x, -1)",
        "x.softmax(-1)",
        "(x @ y).log_softmax(-1)",
        "import torch; torch.ops.aten._softmax(x)",
        "import torch; torch.optim.AdamW(p)",
        "from torch.optim.lr_scheduler import LambdaLR",
        "from torch.utils.data import DataLoader",
        "from torch import embedding",
        "import torch as t; t.rms_norm(x)",
    ],
)
def test_forbidden_spellings_are_found(line):
    assert violations(line)


def test_allowed_spellings_are_not():
    assert not violations(
        "import torch\nfrom torch import nn\nfrom cs_lm import ops\n"
        "class A(nn.Module): pass\nclass B(torch.optim.Optimizer): pass\n"
        "nn.Parameter(x); nn.ModuleList(); ops.softmax(x); self.ops.rms_norm(x); x.logsumexp(-1)\n"
        "torch.autograd.Function; torch.compile(f); torch._foreach_mul_(a, b); torch.sigmoid(x)\n"
    )
