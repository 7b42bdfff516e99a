"""Who may import whom. The tree reads from the mathematics upwards to the command line; imports go downwards only."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dihal

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "dihal").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}

# A unit may import units of the levels above its own in this table (below it in the architecture), and itself.
LEVELS = (
    ("types", "errors"),
    ("io", "page_style", "provenance", "random", "ties"),
    ("config",),
    ("diffusion", "nn", "geometry.moments", "geometry.neighbours", "geometry.proxies", "geometry.intervals"),
    ("backbone", "data"),
    ("spaces", "lora", "geometry"),
    ("meter",),
    ("method_parts",),
    ("writing", "writer"),
    ("masked",),
    ("methods", "checkpoint"),
    ("controls", "restore"),
    ("hybrid", "decoding"),
    ("training", "evaluation", "circuits"),
    ("sweep",),
    ("cli",),
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}
# Pure functions within one package: they may use each other.
WRITING = {"writing", "writer"}  # one class and its parts
MATHEMATICS = {unit for unit in LEVEL if unit.startswith("geometry.")}

# Who may import a library at all, be it inside a function; a reason for each that is not the obvious one.
LIBRARIES = {
    "transformers": {
        "backbone": "the package that reads a Hugging Face model",
        "hybrid": "the hybrid is a Hugging Face model itself",
        "evaluation.generation": "settings of transformers' own generate()",
        "data.tokens": "type of a tokenizer, for annotations",
        "data.module": "type of a tokenizer, for annotations",
    },
    "tokenizers": {"backbone": "tokenizers of GGUF files"},
    "lightning": {"training": "the loop", "data.module": "the LightningDataModule"},
    "peft": {"lora": "the adapters"},
    "matplotlib": {
        "geometry.figure": "the scores figure",
        "evaluation.plots": "the leaderboard figure",
        "evaluation.frontier.figure": "the frontier figure",
        "sweep.figure": "the sweep figure",
        "circuits.figures": "the figures of one run",
        "circuits.figures_compare": "the figures of a comparison",
        "circuits.drawing": "the drawing of a circuit",
    },
    "wandb": {"training.logs": "a mirror"},
    "tensorboard": {"training.logs": "a mirror"},
    "datasets": {"data.sources": "Hugging Face data sets"},
    "pyarrow": {"data.sources": "Parquet"},
    "mauve": {"evaluation.frontier.distances": "MAUVE"},
    "jsonargparse": {"config": "command lines"},
}
ANNOTATIONS_ONLY = {("data.tokens", "transformers"), ("data.module", "transformers")}


def unit_of(module: str) -> str:
    """`dihal.geometry.moments` -> its entry in LEVEL."""
    own = module.removeprefix("dihal").removeprefix(".")
    return own if own in LEVEL else own.split(".")[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules imported anywhere in a file, and whether for type checkers only."""

    def visit(node: ast.AST, typing: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, typing)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module), typing
        for child in ast.iter_child_nodes(node):
            yield from visit(child, typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module: str) -> None:
    unit = unit_of(module)
    if module == "dihal":
        assert all(typing for name, typing in imports(MODULES[module]) if name.startswith("dihal"))
        return
    assert unit in LEVEL, f"{module} has no level yet: add it to LEVELS"
    for name, _ in imports(MODULES[module]):
        if name == "dihal" or not name.startswith("dihal."):
            continue
        other = unit_of(name)
        siblings = unit == other or {unit, other} <= MATHEMATICS or {unit, other} <= WRITING
        assert siblings or LEVEL[other] < LEVEL[unit], f"{module} imports {name}: not below it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_libraries_are_known_to_their_owners_only(module: str) -> None:
    own = module.removeprefix("dihal").removeprefix(".")
    for name, typing in imports(MODULES[module]):
        owners = LIBRARIES.get(name.split(".")[0])
        if name.startswith("torch.utils.tensorboard"):
            owners = LIBRARIES["tensorboard"]
        if owners is None:
            continue
        owner = next((o for o in owners if own == o or own.startswith(f"{o}.")), None)
        assert owner is not None, f"{module} imports {name}; only {', '.join(owners)} may"
        assert typing or (owner, name.split(".")[0]) not in ANNOTATIONS_ONLY


def test_no_exception_is_stale() -> None:
    used = {(own, name.split(".")[0]) for own, path in MODULES.items() for name, _ in imports(path)}
    used |= {(own, "tensorboard") for own, path in MODULES.items() if "tensorboard" in path.read_text(encoding="utf-8")}
    for library, owners in LIBRARIES.items():
        for owner in owners:
            assert any(
                found == library and (own == f"dihal.{owner}" or own.startswith(f"dihal.{owner}."))
                for own, found in used
            ), f"{owner} no longer imports {library}"


def test_diffusion_and_nn_stand_alone() -> None:
    allowed = {
        "torch",
        "jaxtyping",
        "math",
        "numpy",
        "dihal",
        "typing",
        "dataclasses",
        "collections",
        "itertools",
        "__future__",
    }
    for module, path in MODULES.items():
        if unit_of(module) in ("diffusion", "nn"):
            assert {name.split(".")[0] for name, _ in imports(path)} <= allowed, module
            assert not {unit_of(name) for name, _ in imports(path)} & {"diffusion", "nn"} - {unit_of(module)}


def test_import_dihal_is_light() -> None:
    """Neither the package nor its command line pays for a library before it is needed."""
    heavy = "transformers lightning matplotlib wandb peft pyarrow datasets tensorboard torch"
    program = (
        f"import sys, dihal, dihal.cli, dihal.config.cli; print([n for n in '{heavy}'.split() if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def defined(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"dihal"}))
def test_public_names_exist(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names = ast.literal_eval(node.value)
            assert len(set(names)) == len(names)
            assert set(names) <= defined(tree)
            return
    assert module == "dihal.training" or not module.count(".") > 1 or MODULES[module].name == "__init__.py"


@pytest.mark.parametrize("name", dihal.__all__)
def test_the_package_gives_what_it_promises(name: str) -> None:
    assert getattr(dihal, name) is not None


def test_every_folder_is_a_package() -> None:
    found = {info.name for info in pkgutil.walk_packages(dihal.__path__, "dihal.")}
    assert found == set(MODULES) - {"dihal"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_are_short(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{module} has {lines} lines: split it where a reader would"
