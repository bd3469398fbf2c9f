"""What the installed libraries offer, read from their source files without importing them. Floor 1.

Importing transformers, torch or peft takes seconds and hundreds of MB; the names of models,
optimizers and arguments stand in their source as literals. Where a library is written otherwise
than is known here, the answer is None: then nothing is said.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_PARSER = threading.Lock()


@cache
def package_folder(name: str) -> Path | None:
    """Of a top-level package: looking for one inside would import what is around it."""
    # On disk: what this process has imported, or was kept from importing, does not count.
    found = (finder.find_spec(name, None) for finder in sys.meta_path)
    spec = next((spec for spec in found if spec), None)
    return Path(spec.origin).parent if spec and spec.origin else None


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _tree(package: str, path: str) -> ast.Module | None:
    folder = package_folder(package)
    if folder is None:
        return None
    try:
        # Up to Python 3.11 parsers in several threads disturb each other: python/cpython#106905.
        with _PARSER:
            return ast.parse((folder / path).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None


# --- transformers ---------------------------------------------------------------------------------


@cache
def model_types() -> dict[str, str] | None:
    """model_type -> the class of its configuration."""
    found: dict[str, str] = {}
    for path in ("models/auto/auto_mappings.py", "models/auto/configuration_auto.py"):
        found |= _names(_tree("transformers", path), "CONFIG_MAPPING_NAMES")
    return found or None


@cache
def causal_types() -> frozenset[str] | None:
    """The model types that have a causal language model."""
    tree = _tree("transformers", "models/auto/modeling_auto.py")
    own = _names(tree, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    known = model_types()
    if not own or not known:
        return None
    classes = {known.get(name) for name in own}
    return frozenset(name for name, kind in known.items() if name in own or kind in classes)


def _names(tree: ast.Module | None, variable: str) -> dict[str, str]:
    """The pairs of texts in every statement that fills this mapping."""
    found: dict[str, str] = {}
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr):
            if variable in {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}:
                found |= dict(_pairs(statement))
    return found


def _pairs(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            pairs = [(node.elts[0], node.elts[1])]
        elif isinstance(node, ast.Dict):
            pairs = [(k, v) for k, v in zip(node.keys, node.values, strict=True) if k]
        else:
            continue
        for key, value in pairs:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                # A value may be several classes, of which any shows that there is one.
                text = value.value if isinstance(value, ast.Constant) else key.value
                yield key.value, str(text)


def schedulers() -> list[str]:
    return sorted(_scheduler_makers(_tree("transformers", "optimization.py")))


@cache
def scheduler_arguments(name: str) -> frozenset[str] | None:
    """What `lr_scheduler_kwargs` may hold; None where the scheduler takes anything."""
    tree = _tree("transformers", "optimization.py")
    maker = _scheduler_makers(tree).get(name)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef) and node.name == maker:
            given = {"optimizer", "num_warmup_steps", "num_training_steps"}
            arguments = [*node.args.args, *node.args.kwonlyargs]
            names = frozenset(a.arg for a in arguments) - given
            return None if node.args.kwarg else names
    return None


def _scheduler_makers(tree: ast.Module | None) -> dict[str, str]:
    enum = _tree("transformers", "trainer_utils.py")
    values = dict(_members(enum, "SchedulerType"))
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            if ast.unparse(node.targets[0]) == "TYPE_TO_SCHEDULER_FUNCTION":
                pairs = zip(node.value.keys, node.value.values, strict=True)
                texts = [(ast.unparse(k).rpartition(".")[2], ast.unparse(v)) for k, v in pairs if k]
                return {values[key]: maker for key, maker in texts if key in values}
    return {}


def _members(tree: ast.Module | None, name: str) -> Iterator[tuple[str, str]]:
    for node in _class_body(tree, name):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield ast.unparse(node.targets[0]), str(node.value.value)


def _class_body(tree: ast.Module | None, name: str) -> list[ast.stmt]:
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node.body
    return []


# --- torch ----------------------------------------------------------------------------------------


def torch_build() -> dict[str, Any] | None:
    """torch/version.py: `__version__`, `cuda` and `hip` (None where built without)."""
    tree = _tree("torch", "version.py")
    found: dict[str, Any] = {}
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node.value.value
    return found or None


@cache
def optimizers() -> dict[str, Path] | None:
    """Class -> the file of torch.optim it stands in."""
    folder = package_folder("torch")
    tree = _tree("torch", "optim/__init__.py")
    found = {}
    for node in tree.body if tree else []:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.optim."):
            for name in node.names:
                if name.name[:1].isupper() and folder:
                    found[name.name] = folder / f"optim/{str(node.module).rpartition('.')[2]}.py"
    return found or None


@cache
def optimizer_arguments(name: str) -> dict[str, Any] | None:
    """Argument -> its default; None where that cannot be told."""
    path = (optimizers() or {}).get(name)
    return _arguments(f"optim/{path.name}", name) if path else None


@cache
def plateau_arguments() -> frozenset[str] | None:
    found = _arguments("optim/lr_scheduler.py", "ReduceLROnPlateau")
    return frozenset(found) if found else None


def _arguments(path: str, name: str) -> dict[str, Any] | None:
    """Those of the class's __init__, with their defaults."""
    tree = _tree("torch", path)
    for node in _class_body(tree, name):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args
            if arguments.vararg or arguments.kwarg:
                return None
            names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
            late = arguments.args[len(arguments.args) - len(arguments.defaults) :]
            defaults: dict[str, Any] = dict.fromkeys(names)
            pairs = [*zip(late, arguments.defaults, strict=True)]
            pairs += [
                (argument, value)
                for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                if value
            ]
            for argument, value in pairs:
                defaults[argument.arg] = _value(value, tree)
            return {key: defaults[key] for key in names if key not in ("self", "params")}
    return None


def _value(node: ast.expr, tree: ast.Module | None) -> Any:
    """Of a literal, or of a name that the module gives one, or of a tuple of such."""
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, tree) for part in node.elts)
    name = ast.unparse(node)
    for statement in tree.body if tree and isinstance(node, ast.Name) else []:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            node = statement.value
            break
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


# --- peft -----------------------------------------------------------------------------------------


@cache
def lora_arguments() -> frozenset[str] | None:
    own = _fields(_tree("peft", "tuners/lora/config.py"), "LoraConfig")
    base = _tree("peft", "config.py")
    inherited = _fields(base, "PeftConfig") | _fields(base, "PeftConfigMixin")
    return own | inherited if own and inherited else None


def _fields(tree: ast.Module | None, name: str) -> frozenset[str]:
    body = _class_body(tree, name)
    return frozenset(
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


@cache
def lora_default_types() -> frozenset[str] | None:
    """The model types for which PEFT knows target modules of its own."""
    tree = _tree("peft", "utils/constants.py")
    name = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if isinstance(node.value, ast.Dict):
                keys = [key for key in node.value.keys if isinstance(key, ast.Constant)]
                return frozenset(str(key.value) for key in keys)
    return None


# --- versions -------------------------------------------------------------------------------------


def older(version_text: str, least: str) -> bool:
    """Whether a version is below another, by its numbers."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])

    return numbers(version_text) < numbers(least)
