"""The rules of docs/architecture.md that a machine can hold: imports, sizes, state, output."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "thinslice"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself, from rooms further down in this list, and from nothing else here.
LAYERS = (
    ("cli",),
    ("serve",),
    ("engine",),
    ("pack",),
    ("text", "memory", "store"),
    ("model", "checkpoint"),
    ("kernels",),
    ("plan",),
    ("config",),
    ("constraint",),
    ("process",),
    ("units", "closing", "forks"),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = ("units", "closing", "forks", "process", "errors", "config", "plan", "store")
# What computes on a card, or copies there; all else has arrays of NumPy.
TORCH_FILES = (
    "kernels/torch_ops.py",
    "kernels/cuda_ops.py",
    "kernels/triton_*.py",
    "memory/cuda_device.py",
)
# What loads, runs, compares and packs models.
WITHOUT_A_CARD = (
    "thinslice.cli.commands",
    "thinslice.engine.llm",
    "thinslice.engine.async_engine",
    "thinslice.engine.compare",
    "thinslice.pack.pack",
)
# A start from a model that is here and runs as it is on the processor needs none of these.
LATE = (
    "difflib",
    "llguidance",
    "thinslice.memory.device_slices",
    "thinslice.memory.spilled_kv",
    "thinslice.pack.",
    "thinslice.store.changes",
    "thinslice.store.hub",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 70, 5
Function = ast.FunctionDef | ast.AsyncFunctionDef

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module


def imported_by_name(tree: ast.AST) -> Iterator[str]:
    """Modules whose names are given to a function that imports."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    for call in calls:
        is_import = ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")
        if is_import and isinstance(call.args[0], ast.Constant):
            yield str(call.args[0].value)


def functions_of(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@each_file
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for _, module in imports_of(parse(path)):
        if module.startswith("thinslice."):
            other = module.split(".")[1]
            is_down = other == room or LEVEL[other] > LEVEL[room]
            assert is_down, f"{room} may not import {module}"


@each_file
def test_imports_stand_at_the_top_but_for_commands_and_what_few_starts_need(path: Path) -> None:
    if room_of(path) == "cli":
        return
    for function in functions_of(parse(path)):
        for node, module in imports_of(function):
            names = [module]
            if isinstance(node, ast.ImportFrom):
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            is_late = any(name.startswith(LATE) for name in names)
            assert is_late, f"{function.name} imports {names[-1]}"


@each_file
def test_only_the_command_line_prints_reads_arguments_or_exits(path: Path) -> None:
    if room_of(path) == "cli":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit", "quit"), node.lineno
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.argv", "sys.exit", "sys.stdout"), node.lineno


@each_file
def test_no_global_state_no_pickle_no_code_from_files(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"global at {node.lineno}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load", "compile"), f"{name}: {node.lineno}"
    for _, module in imports_of(parse(path)):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
        assert module.split(".")[0] != "transformers"


@each_file
def test_sizes(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines"
    for function in functions_of(parse(path)):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
        # A kernel on a GPU takes all that it works with one by one.
        is_kernel = "triton.jit" in (ast.unparse(one) for one in function.decorator_list)
        assert is_kernel or len(names) <= MAX_PARAMETERS, (
            f"{function.name} takes {len(names)} parameters"
        )


@each_file
def test_broad_excepts_only_clean_up_and_raise_again(path: Path) -> None:
    if path == PACKAGE / "cli" / "exit_codes.py":
        return  # where a bug of ours becomes an exit code
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            is_raised_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            is_broad = caught in ("", "Exception", "BaseException")
            assert not is_broad or is_raised_again, f"line {node.lineno}"


@each_file
def test_modules_and_public_names_say_what_they_are(path: Path) -> None:
    tree = parse(path)
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "the module says nothing"
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} says nothing"


@each_file
def test_torch_is_imported_for_a_card_alone(path: Path) -> None:
    if any(path.match(f"thinslice/{one}") for one in TORCH_FILES):
        return
    tree = parse(path)
    names = [*(name for _, name in imports_of(tree)), *imported_by_name(tree)]
    assert "torch" not in [name.split(".")[0] for name in names]


def test_a_model_runs_on_the_processor_without_torch() -> None:
    check = f"import sys, {', '.join(WITHOUT_A_CARD)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("module", TORCH_FREE)
def test_planning_and_the_store_need_no_torch(module: str) -> None:
    files = [path for path in FILES if room_of(path) == module and path.name != "__init__.py"]
    names = [".".join(("thinslice", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in files]
    check = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
