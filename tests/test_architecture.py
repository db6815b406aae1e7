"""The house stands as drawn: who imports whom, how long things are, which flags there are, what `--help` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.fields import config_fields

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "data", "eval")
SOURCES = [ROOT / "run.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
# floor -> the floors it may import from. engine/commands/ is where the rooms meet; run.py sees engine alone.
BELOW = {
    "run": {"engine", "engine.commands", "data"},
    "engine.commands": {"engine.commands", "engine", "eval", "data"},
    "engine": {"engine", "data"},
    "eval": {"eval", "data"},
    "data": {"data"},
}
TRAINERS = {"sentence_transformers", "accelerate", "lightning", "pytorch_lightning", "webdataset", "open_clip"}
HEAVY = {"transformers", "datasets", "pyarrow", "tensorboard", "huggingface_hub"}

# (file, function) -> the reason why it may be longer than 60 lines.
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}

# (file, function) -> the reason why it may take more than six parameters.
MANY_PARAMETERS: dict[tuple[str, str], str] = {
    ("eval/band_kernel.py", "_scan"): "a Triton kernel takes pointers and sizes, and no objects",
}

# file -> how many lines it may have, where that is not 400.
LONG_FILES = {"run.py": 100}


def floor(module: str) -> str:
    """The floor that a dotted module belongs to."""
    parts = module.split(".")
    return "engine.commands" if parts[:2] == ["engine", "commands"] else parts[0]


def imports(tree: ast.AST) -> list[str]:
    """Every module named by an import statement anywhere in the tree."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(tree):
        assert module.split(".")[0] not in TRAINERS | {"tests"}, f"{path}: imports {module}"
        assert module != "eval", f"{path}: a bare `import eval` hides the builtin"
        if module.split(".")[0] in ROOMS:
            assert floor(module) in BELOW[own], f"{path}: {own} must not import {module}"
    for node in tree.body:
        for module in imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            assert module.split(".")[0] not in HEAVY, f"{path}: import {module} where it is needed"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_size_budget(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONG_FILES.get(str(path.relative_to(ROOT)), 400), f"{path}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60 or (path.name, node.name) in LONG_FUNCTIONS, f"{path}: {node.name} has {lines} lines"


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters, without `self`, `cls`, `*args` and `**kwargs`."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_has_more_than_six_parameters(path: Path) -> None:
    """More of them means that something wants to be an object; a caller mixes up the seventh."""
    file = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = parameters(node)
            assert len(names) <= 6 or (file, node.name) in MANY_PARAMETERS, f"{file}: {node.name} takes {names}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_are_commands_or_nouns(path: Path) -> None:
    """"What a run writes" leaves open whether the function returns, writes or prints it."""
    file = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            name = getattr(node, "name", "the module")
            assert not text.startswith(("What ", "Is ", "Where ")), f"{file}: {name}: {text.splitlines()[0]}"


def test_no_module_hides_one_of_the_standard_library() -> None:
    taken = sys.stdlib_module_names - {"data"}
    assert not [path for path in SOURCES if path.stem in taken and path.stem != "__init__"]


def test_the_flags_are_the_frozen_ones() -> None:
    assert sorted(config_fields()) == sorted(FLAGS)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = ("import sys, run\ntry: run.main(['--help'])\nexcept SystemExit: pass\n"
            f"print('HEAVY', sorted({HEAVY | {'torch', 'numpy', 'PIL'}} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "HEAVY []" in done.stdout


FLAGS = [
    "allow_host",
    "augment",
    "batch_size",
    "best_metric",
    "cache_dir",
    "checkpoint",
    "clip_norm",
    "compile",
    "cuda_graph",
    "dataset",
    "delimiter",
    "device",
    "dist_timeout",
    "dtype",
    "duplicates",
    "encoding",
    "epochs",
    "eval_every",
    "eval_splits",
    "folds",
    "gradient_checkpointing",
    "hardness",
    "html",
    "image",
    "image_column",
    "image_root",
    "image_template",
    "interpolate",
    "json",
    "keep",
    "l2_sp",
    "license",
    "log_every",
    "loss",
    "lr",
    "max_bad",
    "max_pixels",
    "micro_batch",
    "mine_negatives",
    "mode",
    "model",
    "negative_column",
    "out",
    "patience",
    "precision",
    "private",
    "probe",
    "profile",
    "proxy",
    "prune",
    "push_to_hub",
    "queries",
    "query",
    "quiet",
    "recipe",
    "resize",
    "resume",
    "retry_failed",
    "run",
    "save_every",
    "scale",
    "schedule",
    "seed",
    "seeds",
    "shuffle_buffer",
    "space",
    "split",
    "split_column",
    "splits",
    "strict",
    "template",
    "title_column",
    "to",
    "top",
    "train_samples",
    "trainable",
    "trials",
    "variants",
    "warmup",
    "weight_decay",
    "workers",
]
