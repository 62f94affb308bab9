"""The directions of the house: what a room may import, and what must answer without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kronsearch.plan import save_plan

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kronsearch"
FACADE = "kronsearch"  # the package itself: names for users, imported when they are first used
CLI = ("cli", "commands", "config", "given", "report", "tables", "watching")
LINE = (
    "sekron",
    "training",
    "models",
    "finetuning",
    "search",
    "cli",
)  # each may import itself and what stands before it
COMMON = ("errors", "files", "jsontext", "yamlfile", "usercode", "budget", "choices", "plan", "progress")
COMMON_MAY_IMPORT = {
    "errors": (),
    "files": ("kronsearch.errors",),
    "jsontext": (),
    "yamlfile": ("kronsearch.errors", "kronsearch.files"),
    "usercode": (),
    "budget": ("kronsearch.errors",),
    "choices": ("kronsearch.errors",),
    "progress": (),
    "plan": ("kronsearch.errors", "kronsearch.files", "kronsearch.jsontext", "kronsearch.sekron.spec"),
}
OWNERS = {  # third parties that only these may import
    "fvcore": ("kronsearch.models.",),
    "optuna": ("kronsearch.search.",),
    "timm": ("kronsearch.models.",),
    "torchvision": ("kronsearch.models.", "kronsearch.training."),
    "rich": ("kronsearch.report", "kronsearch.tables", "kronsearch.watching"),
    "yaml": ("kronsearch.yamlfile",),
    "typer": ("kronsearch.cli", "kronsearch.commands", "kronsearch.given"),
}
PUTS_BACK = {"kronsearch.models.timing": {"torch.set_num_threads"}}  # what is global is set there, and undone
HEAVY = ("torch", "optuna", "pandas", "scipy", "sklearn", "fvcore", "numpy")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """Return the room: a folder's name, "cli" for all of the command line, or a common module's name."""
    parts = module.split(".")
    if len(parts) == 1:
        return FACADE
    return "cli" if parts[1] in CLI else parts[1]


def imports_of(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names of all that a module imports, wherever in it; from a package, the submodule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield longer if longer in MODULES else node.module


def is_allowed(importer: str, imported: str) -> bool:
    """Tell whether a module of the house may import another one of it."""
    room, other = room_of(importer), room_of(imported)
    if room == FACADE:
        return True
    if other == FACADE:
        return room == "cli"
    if room in COMMON:
        return imported in COMMON_MAY_IMPORT[room]
    if room == "sekron":
        return other == "sekron" or imported == "kronsearch.errors"
    return other in COMMON or LINE.index(other) <= LINE.index(room)


def test_every_module_has_a_room():
    rooms = {room_of(module) for module in MODULES}
    assert rooms - {FACADE} <= {*LINE, *COMMON}
    assert {"sekron", "training", "models", "cli", *COMMON} <= rooms


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kronsearch.sekron.spec", "kronsearch.plan"),
        ("kronsearch.training.data", "kronsearch.models.profile"),
        ("kronsearch.models.apply", "kronsearch.search.space"),
        ("kronsearch.search.run", "kronsearch.report"),
        ("kronsearch.search.run", "kronsearch"),
        ("kronsearch.budget", "kronsearch.plan"),
        ("kronsearch.plan", "kronsearch.sekron.layers"),
    ],
)
def test_the_rule_forbids(importer, imported):
    assert not is_allowed(importer, imported)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    inside = [name for name in imports_of(module, MODULES[module]) if name.split(".")[0] == "kronsearch"]
    assert [name for name in inside if not is_allowed(module, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_have_one_owner(module):
    outside = [name.split(".")[0] for name in imports_of(module, MODULES[module])]
    assert [name for name in outside if name in OWNERS and not f"{module}.".startswith(OWNERS[name])] == []


def used_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that code reads, except those used where the global generators are put back after."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With) and any("fork_rng(" in ast.unparse(item) for item in node.items):
            continue
        if isinstance(node, ast.Name | ast.Attribute):
            yield ast.unparse(node)
        yield from used_names(node)


def is_a_program(tree: ast.Module) -> bool:
    """Tell whether a module is made for `python -m`: a command line of its own."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


BELOW = [module for module in MODULES if room_of(module) != "cli"]


@pytest.mark.parametrize("module", [module for module in BELOW if not is_a_program(MODULES[module])])
def test_nothing_below_the_command_line_prints(module):
    assert set(used_names(MODULES[module])) & {"print", "sys.stdout", "sys.stderr", "logging.basicConfig"} == set()


@pytest.mark.parametrize("module", BELOW)
def test_nothing_below_the_command_line_seeds_or_sets_what_is_global(module):
    forbidden = {
        *("random.seed", "np.random.seed", "torch.seed", "torch.manual_seed", "torch.default_generator.manual_seed"),
        *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.use_deterministic_algorithms"),
        *("torch.set_num_threads", "torch.set_default_dtype", "torch.set_default_device"),
    }
    assert set(used_names(MODULES[module])) & forbidden == PUTS_BACK.get(module, set())


def test_the_rule_sees_seeds_but_not_where_they_are_undone():
    undone = "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)"
    assert "torch.manual_seed" not in set(used_names(ast.parse(undone)))
    assert "torch.manual_seed" in set(used_names(ast.parse("def f():\n    torch.manual_seed(0)")))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_and_what_it_offers(module):
    tree = MODULES[module]
    offers = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and "__all__" in map(ast.unparse, node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    only_a_docstring = all(isinstance(node, ast.Expr) for node in tree.body)
    assert only_a_docstring or [type(value) for value in offers] == [ast.List]
    assert ast.get_docstring(tree)


def run_without(heavy: tuple[str, ...], code: str, cwd: Path) -> str:
    """Run code in a new interpreter in which importing any of the heavy modules fails, and return what it printed."""
    blocked = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({heavy!r})); "
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        *("kronsearch", "kronsearch.errors", "kronsearch.files", "kronsearch.budget", "kronsearch.plan"),
        *("kronsearch.sekron", "kronsearch.sekron.shapes", "kronsearch.sekron.spec", "kronsearch.sekron.execution"),
        *("kronsearch.cli", "kronsearch.commands", "kronsearch.config", "kronsearch.report", "kronsearch.watching"),
        *("kronsearch.progress", "kronsearch.search.space"),
    ],
)
def test_what_knows_only_numbers_imports_no_torch(module, tmp_path):
    run_without(HEAVY, f"import {module}", tmp_path)


def test_show_and_help_import_no_torch(plan, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    call = "sys.argv[1:] = {}; from kronsearch.cli import main; main()"
    assert "zoo:digits" in run_without(HEAVY, call.format(["show", "plan.json"]), tmp_path)
    assert "--budget-flops" in run_without(HEAVY, call.format(["run", "--help"]), tmp_path)


def test_what_can_be_refused_without_torch_is(tmp_path):
    call = (
        "from kronsearch.config import Settings; from kronsearch import commands\n"
        "from kronsearch.errors import KronsearchError; from pathlib import Path\n"
        "try: {}\nexcept KronsearchError as error: print(error)"
    )
    for line, told in (
        ('commands.sweep(Settings(model="zoo:digits", budget_flops="50%:30%:3"))', "go nowhere"),
        ('commands.bench(Path("none.json"), None, Settings(model="zoo:digits"))', "can't read the plan none.json"),
        ('commands.bench(None, None, Settings(model="zoo:digits"))', "nothing to compare with"),
    ):
        assert told in run_without(HEAVY, call.format(line), tmp_path)


def test_every_name_of_the_package_is_there():
    import kronsearch

    missing = [name for name in kronsearch.__all__ if not hasattr(kronsearch, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kronsearch.nothing  # noqa: B018


def offered_by(tree: ast.Module) -> set[str] | None:
    """Return the names in a module's `__all__`, None where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_imported_from_a_module_is_offered_there(module):
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            offered = offered_by(MODULES[node.module])
            if offered is not None:
                taken = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
                assert taken <= offered, f"{module} takes from {node.module} what is not in its __all__"
