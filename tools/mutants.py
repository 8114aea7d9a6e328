"""Change one thing at a time in the code and see whether the tests beside it notice.

    python tools/mutants.py [scheduler block_manager ...] [--sample 20 --seed 7] [--json]

Each mutant runs in a process forked from one that has NumPy and pytest imported already, one for
each core at a time; nothing is written to the tree. What survives and is not listed in
mutants_known.json, with the reason why no test can tell it from the code, ends the run with 1. So
does an entry there that is not true any more.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
KNOWN = Path(__file__).with_name("mutants_known.json")
TARGETS = {
    "planner": (
        "thinslice/plan/planner.py",
        ["tests/unit/plan/test_planner.py", "tests/unit/plan/test_choose.py"],
    ),
    "choose": (
        "thinslice/plan/choose.py",
        [
            "tests/unit/plan/test_search.py",
            "tests/unit/plan/test_choose.py",
            "tests/unit/plan/test_planner.py",
        ],
    ),
    "search": (
        "thinslice/plan/search.py",
        [
            "tests/unit/plan/test_search.py",
            "tests/unit/plan/test_choose.py",
            "tests/unit/plan/test_planner.py",
        ],
    ),
    "scheduler": (
        "thinslice/engine/scheduler.py",
        [
            "tests/unit/engine/test_scheduler.py",
            "tests/unit/engine/test_scoring.py",
            "tests/unit/engine/test_shares.py",
        ],
    ),
    "block_manager": (
        "thinslice/engine/block_manager.py",
        ["tests/unit/engine/test_block_manager.py", "tests/unit/engine/test_scheduler.py"],
    ),
    "sampler": ("thinslice/engine/sampler.py", ["tests/unit/engine/test_sampler.py"]),
}
# Of the time that the tests take of the code as it is; a mutant that runs on for longer hangs.
_PATIENCE = 10.0
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change. What names it does not hang on line numbers, which move.

    Attributes:
        function: the qualified name of where it is.
        line: the source line as it is, without its indentation.
        change: what becomes of it.
        number: which of the same changes in the same line of the same function.
    """

    target: str
    function: str
    line: str
    change: str
    number: int


class Mutator(ast.NodeTransformer):
    """Walks a module and makes the change with one index; counts them all on the way.

    Numbers at the top of a module stay: they are choices that measurements support, and those
    beside them are as right.
    """

    def __init__(self, source: str, wanted: int | None = None) -> None:
        self._lines = source.splitlines()
        self._wanted = wanted
        self._scope: list[str] = []
        self.found: list[tuple[str, str, str]] = []

    def _is_wanted(self, node: ast.AST, change: str) -> bool:
        line = self._lines[node.lineno - 1].strip()  # type: ignore[attr-defined]
        self.found.append((".".join(self._scope), line, change))
        return len(self.found) - 1 == self._wanted

    def _scoped(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        self._scope.append(node.name)
        # Docstrings, decorators, annotations and defaults stay.
        node.body = [item for one in node.body for item in _as_list(self.visit(one))]
        self._scope.pop()
        return node

    visit_FunctionDef = visit_ClassDef = _scoped

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self._dropped(node) if self._scope else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for index, operator in enumerate(node.ops):
            other = _COMPARISONS[type(operator)]
            if self._is_wanted(node, f"{type(operator).__name__} becomes {other.__name__}"):
                node.ops[index] = other()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = _OPERATIONS.get(type(node.op))
        if other and self._is_wanted(node, f"{type(node.op).__name__} becomes {other.__name__}"):
            node.op = other()
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        if self._is_wanted(node, f"{type(node.op).__name__} becomes {other.__name__}"):
            node.op = other()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and self._is_wanted(node, "not is dropped"):
            return node.operand
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            if self._is_wanted(node, f"{node.value} becomes {not node.value}"):
                return ast.copy_location(ast.Constant(not node.value), node)
        elif isinstance(node.value, int) and self._is_wanted(
            node, f"{node.value} becomes {node.value + 1}"
        ):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
            other = _OPPOSITES[node.func.id]
            if self._is_wanted(node, f"{node.func.id} becomes {other}"):
                node.func = ast.copy_location(ast.Name(other, ast.Load()), node.func)
        return node

    def _negated(self, node: ast.If | ast.While) -> ast.AST:
        self.generic_visit(node)
        if self._is_wanted(node, "the condition is negated"):
            node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return node

    visit_If = visit_While = _negated

    def _dropped(self, node: ast.stmt) -> ast.AST:
        self.generic_visit(node)
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        targets = node.targets if isinstance(node, ast.Assign) else []
        # Without the value of a name the next line fails, which says nothing of the tests.
        makes_name = any(isinstance(target, ast.Name | ast.Tuple) for target in targets)
        if (
            not is_docstring
            and not makes_name
            and self._is_wanted(node, "the statement is dropped")
        ):
            return ast.copy_location(ast.Pass(), node)
        return node

    visit_Expr = visit_AugAssign = visit_Delete = _dropped


def _as_list(node: ast.AST | list[ast.AST]) -> list[ast.AST]:
    return node if isinstance(node, list) else [node]


def mutants_of(target: str) -> list[Mutant]:
    """Every change of a module, in the order of its lines."""
    source = (ROOT / TARGETS[target][0]).read_text()
    mutator = Mutator(source)
    mutator.visit(ast.parse(source))
    counts: dict[tuple[str, str, str], int] = {}
    mutants = []
    for found in mutator.found:
        counts[found] = counts.get(found, 0) + 1
        mutants.append(Mutant(target, *found, number=counts[found]))
    return mutants


class _MutatedImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a module its changed code when it is first imported."""

    def __init__(self, path: str, index: int | None) -> None:
        self._path = ROOT / path
        self._name = path.removesuffix(".py").replace("/", ".")
        self._index = index

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self._path))

    def exec_module(self, module: ModuleType) -> None:
        source = self._path.read_text()
        tree = Mutator(source, self._index).visit(deepcopy(ast.parse(source)))
        module.__file__ = str(self._path)
        exec(compile(ast.fix_missing_locations(tree), str(self._path), "exec"), vars(module))


def _child(target: str, index: int | None) -> None:
    """Run the tests beside a module in this forked process; the exit code is pytest's."""
    import pytest  # noqa: PLC0415 - imported before the fork

    path, tests = TARGETS[target]
    sys.meta_path.insert(0, _MutatedImport(path, index))
    sys.path.insert(0, str(ROOT))
    there = [test for test in tests if (ROOT / test).exists()]
    options = ["-x", "-q", "--hypothesis-seed=0", "--order-seed=file", *there]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # Most mutants fall to a test of one rule, in a hundredth of the time.
        for which in ("not random", "random"):
            code = pytest.main([*options, "-k", which])
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                os._exit(int(code))
    os._exit(0)


def run_mutant(target: str, index: int | None, limit_s: float) -> str:
    """killed, survived or hung: what the tests say of a mutant; ``None`` is the code as it is."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            _child(target, index)
        finally:
            os._exit(70)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def check(target: str, chosen: Sequence[int], mutants: Sequence[Mutant]) -> Iterator[Mutant]:
    """Run some of a module's mutants and give those that survive."""
    start = time.monotonic()
    if run_mutant(target, None, 600.0) != "survived":
        raise SystemExit(f"{target}: the tests fail without any change")
    limit_s = _PATIENCE * (time.monotonic() - start) + 5.0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda index: run_mutant(target, index, limit_s), chosen)
        for place, (index, verdict) in enumerate(zip(chosen, verdicts, strict=True)):
            if sys.stderr.isatty():
                print(f"\r{target} {place + 1}/{len(chosen)}", end="", file=sys.stderr)
            if verdict == "survived":
                one = mutants[index]
                found = f"{target} {one.function}: {one.change} ({one.number}): {one.line}"
                print(f"\rsurvived: {found}", file=sys.stderr, flush=True)
                yield one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="target")
    parser.add_argument("--sample", type=int, help="how many of all, drawn; without it, all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    seed = options.seed if options.seed is not None else int(time.time())
    import numpy  # noqa: F401, PLC0415 - once, for all children
    import pytest  # noqa: F401, PLC0415

    known = {Mutant(**one["mutant"]): one["reason"] for one in json.loads(KNOWN.read_text())}
    pairs = [(t, i) for t in options.targets for i in range(len(mutants_of(t)))]
    if options.sample:
        pairs = sorted(random.Random(seed).sample(pairs, min(options.sample, len(pairs))))
    table = Table("module", "mutants", "killed", "known", "survived", box=None)
    survivors: list[Mutant] = []
    untrue: list[Mutant] = []
    for target in options.targets:
        mutants = mutants_of(target)
        chosen = [index for name, index in pairs if name == target]
        alive = [*check(target, chosen, mutants)] if chosen else []
        ran = {mutants[index] for index in chosen}
        new = [one for one in alive if one not in known]
        survivors += new
        untrue += [one for one in known if one in ran and one not in alive]
        untrue += [one for one in known if one.target == target and one not in mutants]
        counts = len(chosen), len(chosen) - len(alive), len(alive) - len(new), len(new)
        table.add_row(target, *map(str, counts))
    if options.json:
        print(json.dumps({"seed": seed, "survivors": [asdict(one) for one in survivors]}))
    else:
        print(f"seed {seed}")
        Console(width=160).print(table)
        for one in untrue:
            print(f"listed as known, and killed or gone: {one}")
    return int(bool(survivors or untrue))


if __name__ == "__main__":
    sys.exit(main())
