"""The drawer of patches: each expects what is installed, is explained, and no upstream name is replaced without one."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
from conftest import ROOT

import nemotron_sft.train.compat as drawer
from nemotron_sft.errors import UserError
from nemotron_sft.train.compat import registry
from nemotron_sft.train.compat.bridge import count_layers_of_metrics
from nemotron_sft.train.compat.registry import PATCHES, Patch

MODULES = [importlib.import_module(f"{drawer.__name__}.{each.name}") for each in pkgutil.iter_modules(drawer.__path__)]


@pytest.mark.parametrize("entry", PATCHES, ids=lambda entry: entry.function.rpartition("compat.")[2])
def test_every_patched_name_is_what_the_patch_expects(entry, bridge):
    assert entry.why and entry.seen and entry.until
    if entry.function not in registry.APPLIED:  # else it was checked when it was applied
        entry.check()


@pytest.mark.parametrize(
    ("name", "expected", "found"),
    [
        ("megatron.core.utils:get_te_version", "(self)", r"\(\)"),
        ("megatron.core.utils:no_such_name", "()", "missing"),
        ("megatron.no_such_module:name", "()", "missing"),
        ("megatron.core.utils:get_te_version", "missing", r"\(\)"),
        ("megatron.bridge.no_such_package", "package", "missing"),
        ("megatron.core.num_microbatches_calculator:_GLOBAL_NUM_MICROBATCHES_CALCULATOR", "bool | (self)", "NoneType"),
    ],
)
def test_an_upgrade_that_changes_a_name_ends_the_command_and_says_where(name, expected, found, bridge):
    entry = Patch("compat.some.function", "why", {name: expected}, "megatron-core 0.1", "never")
    with pytest.raises(UserError, match=rf"{name} is {found} in .*megatron-core \d.*compat.some.function expects"):
        entry.check()


def test_a_patch_is_checked_once_and_before_it_runs():
    ran = []
    registered = registry.patch({"json:loads": "(text)"}, seen="torch 1", until="never")(lambda: ran.append(1))
    entry = PATCHES.pop()
    with pytest.raises(UserError, match="json:loads is"):
        registered()
    assert not ran and entry.expects


def replaced(file: Path) -> set[tuple[str, str]]:
    """(function, upstream name) for every assignment to an attribute of something imported from another package."""
    tree = ast.parse(file.read_text())
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else ""
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("nemotron_sft"):
            imported |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    found = set()
    for function in tree.body:
        for node in ast.walk(function):
            groups = node.targets if isinstance(node, ast.Assign) else []
            for target in (each for group in groups for each in getattr(group, "elts", [group])):
                root, _, rest = ast.unparse(target).partition(".")
                if isinstance(target, ast.Attribute) and root in imported:
                    found.add((getattr(function, "name", ""), f"{imported[root] or root}.{rest}".replace(":", ".")))
    return found


def test_no_upstream_name_is_replaced_outside_the_drawer_or_without_an_entry():
    ours = {"sys.argv", "logging.raiseExceptions", "os.environ"}
    outside = {
        (str(file.relative_to(ROOT)), *change)
        for folder in ("nemotron_sft", "recipes", "hydra_plugins")
        for file in (ROOT / folder).rglob("*.py")
        if file.parent != Path(drawer.__path__[0])
        for change in replaced(file)
        if change[1] not in ours
    }
    assert not outside
    changed = 0
    for module in MODULES:
        for function, name in replaced(Path(module.__file__)):
            entries = [entry for entry in PATCHES if entry.function == f"{module.__name__}.{function}"]
            assert entries, f"{module.__name__}.{function} replaces {name} without @patch"
            expects = entries[0].expects
            names = expects() if callable(expects) else expects
            assert any(each.replace(":", ".") == name for each in names), f"{function} replaces {name}, unregistered"
            changed += 1
    assert changed > 5  # the search finds what it should


def test_a_stage_without_experts_records_as_many_numbers_as_the_others(bridge, monkeypatch):
    """Bridge asks for as many as there are layers of experts; a sum of two lengths over the stages never ended."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    monkeypatch.setattr(MoEMetricsTracker, "ensure_initialized", MoEMetricsTracker.ensure_initialized)
    for layers in (5, 7):  # a process may build several models
        count_layers_of_metrics(layers)
        without = MoEMetricsTracker()
        without.ensure_initialized("load_balancing_loss", 1)
        assert len(without.metrics["load_balancing_loss"].values) == layers
