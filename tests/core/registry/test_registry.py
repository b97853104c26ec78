"""Plugins: found by entry point, checked, and named where they are at fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command, RecipeWriter

from llavakit import (
    Component,
    Connector,
    Exporter,
    Options,
    PluginError,
    RecipeError,
    Registry,
    hookimpl,
)
from llavakit.registry import all_kinds
from llavakit_plugins.connectors.mlp import Linear


def plugin_with(*components: Any) -> object:
    class Plugin:
        @hookimpl
        def llava_connectors(self) -> list[Any]:
            return list(components)

    return Plugin()


def test_the_built_in_components_register_through_entry_points_as_any_other() -> None:
    plugins = [point for point in entry_points(group="llavakit") if point.dist]
    assert {point.dist.name for point in plugins if point.dist} >= {"llavakit"}
    assert Registry.installed().get(Connector, "linear") is Linear


def test_an_empty_registry_has_nothing() -> None:
    for kind in all_kinds():
        assert Registry.empty().all(kind) == {}


def test_two_components_of_one_name_are_refused_and_stop_no_other() -> None:
    class Other(Linear):
        pass

    class Free(Linear):
        name = "free"

    registry = Registry.empty()
    registry.register(plugin_with(Linear, Free), name="one")
    registry.register(plugin_with(Other), name="two")
    both = r"(Other of two and .*Linear of one|Linear of one and .*Other of two) are both called"
    with pytest.raises(PluginError, match=both):
        registry.get(Connector, "linear")
    with pytest.raises(PluginError, match=both):
        registry.all(Connector)
    assert registry.get(Connector, "free") is Free


def test_one_component_twice_is_no_conflict() -> None:
    registry = Registry.empty()
    registry.register(plugin_with(Linear))
    registry.register(plugin_with(Linear))
    assert registry.all(Connector) == {"linear": Linear}


def test_a_misspelt_hook_is_refused() -> None:
    class Plugin:
        @hookimpl
        def llava_conectors(self) -> list[Any]:
            return []

    with pytest.raises(PluginError, match="unknown hook 'llava_conectors'"):
        Registry.empty().register(Plugin())


class Nameless(Linear):
    name: Any = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (Options, r"component\.Options of mine is not a Connector"),
        (Nameless, "Nameless of mine has no `name`"),
        ("linear", "'linear' of mine is not a Connector"),
        (Linear(Options(), vision_width=1, language_width=1), "of mine is not a Connector"),
    ],
)
def test_what_is_no_component_of_the_kind_is_refused(component: object, sentence: str) -> None:
    registry = Registry.empty()
    registry.register(plugin_with(component), name="mine")
    with pytest.raises(PluginError, match=sentence):
        registry.all(Connector)


def test_a_plugin_registered_twice_is_refused() -> None:
    registry, plugin = Registry.empty(), plugin_with()
    registry.register(plugin, name="one")
    with pytest.raises(PluginError, match="plugin two cannot be registered"):
        registry.register(plugin, name="two")


@pytest.mark.parametrize("fault", [ImportError("no module named x"), KeyError("x"), None])
def test_a_hook_that_fails_is_named(fault: Exception | None) -> None:
    class Plugin:
        @hookimpl
        def llava_connectors(self) -> Any:
            if fault is None:
                return 3
            raise fault

    registry = Registry.empty()
    registry.register(Plugin(), name="mine")
    with pytest.raises(PluginError, match="plugin mine cannot load its Connector components"):
        registry.all(Connector)


def plugin_naming(**places: Any) -> object:
    class Plugin:
        @hookimpl
        def llava_connectors(self) -> dict[str, Any]:
            return places

    return Plugin()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that can be imported; what was imported is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "place_of_mine.py").write_text(MINE.format(name="mine", hook="llava_connectors"))
    (tmp_path / "place_broken.py").write_text("import nothing_of_the_kind")
    for name in ("place_of_mine", "place_broken"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_component_named_by_its_place_is_imported_when_it_is_used(modules: Path) -> None:
    registry = Registry.empty()
    registry.register(
        plugin_naming(mine="place_of_mine:Mine", broken="place_broken:Broken"), name="plugin"
    )
    assert list(registry.origins(Connector)) == ["broken", "mine"]
    with pytest.raises(RecipeError, match="did you mean `mine`"):
        registry.get(Connector, "mien")
    assert "place_of_mine" not in sys.modules
    mine = registry.get(Connector, "mine")
    assert mine is sys.modules["place_of_mine"].Mine
    assert registry.get(Connector, "mine") is mine
    broken = "plugin plugin cannot load its Connector `broken`: No module named 'nothing"
    with pytest.raises(PluginError, match=broken):
        registry.get(Connector, "broken")


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ({"mine": "place_of_mine"}, "`mine`; write it as package.module:Class"),
        ({"mine": Linear}, "`mine`; write it as package.module:Class"),
        ({"mine": "place_of_mine:Other"}, "cannot load its Connector `mine`: .* no attribute"),
        ({"mine": "no_such_place:Mine"}, "cannot load its Connector `mine`: No module named"),
        ({"mine": "place of mine:Mine"}, "cannot load its Connector `mine`: "),
        ({"mine": "place_of_mine:hookimpl"}, "of plugin is not a Connector"),
        ({"my": "place_of_mine:Mine"}, "is called `mine`, but its hook says `my`"),
    ],
)
def test_a_place_where_no_such_component_is_refused(
    modules: Path, places: dict[str, Any], sentence: str
) -> None:
    registry = Registry.empty()
    registry.register(plugin_naming(**places), name="plugin")
    with pytest.raises(PluginError, match=sentence):
        registry.all(Connector)


def test_places_and_classes_of_one_name(modules: Path) -> None:
    """The same class twice is no conflict, another one is: known without importing it."""
    registry = Registry.empty()
    registry.register(plugin_with(Linear), name="one")
    registry.register(plugin_naming(linear=f"{Linear.__module__}:Linear"), name="two")
    assert registry.all(Connector) == {"linear": Linear}
    registry.register(plugin_naming(linear="place_broken:Linear"), name="three")
    with pytest.raises(PluginError, match=r"place_broken.Linear of three and .*mlp.Linear of"):
        registry.get(Connector, "linear")


def test_an_unknown_name_gets_a_suggestion_or_a_list() -> None:
    registry = Registry.installed()
    with pytest.raises(RecipeError, match="no Connector is called `liner`; did you mean `linear`"):
        registry.get(Connector, "liner")
    with pytest.raises(RecipeError, match=r"`xyz`; installed: .*linear, mlp"):
        registry.get(Connector, "xyz")


def distribution(folder: Path, name: str, module: str, text: str) -> None:
    """Write an installed package as pip leaves it: a module and its metadata."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[llavakit]\nmine = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


MINE = """\
from llavakit import Connector, hookimpl

class Mine(Connector):
    name = "{name}"
    def forward(self, features_BPD):
        return features_BPD

@hookimpl
def {hook}():
    return [Mine]
"""


def test_an_installed_package_is_listed_with_its_version(site: Path, llava_run: Command) -> None:
    distribution(
        site, "llava-mine", "llava_mine_a", MINE.format(name="mine", hook="llava_connectors")
    )
    code, out, _ = llava_run("plugins", "--json")
    assert code == 0
    listed = json.loads(out)
    assert list(listed) == [kind.__name__ for kind in all_kinds()]
    assert {"name": "mine", "package": "llava-mine", "version": "1.2"} in listed["Connector"]
    assert "mine                llava-mine 1.2" in llava_run("plugins").out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nothing_of_the_kind", "plugin `mine` of llava-bad failed to import: No module"),
        ("1 / 0", "plugin `mine` of llava-bad failed to import: division by zero"),
        ("def", "plugin `mine` of llava-bad failed to import: "),
        (MINE.format(name="mine", hook="llava_conectors"), "unknown hook 'llava_conectors'"),
        (MINE.format(name="mlp", hook="llava_connectors"), "are both called `mlp`"),
        (MINE.format(name="mine", hook="llava_datasets"), "llava-bad:mine is not a Dataset"),
    ],
)
def test_a_broken_package_is_named(
    site: Path, llava_run: Command, text: str, sentence: str, request: pytest.FixtureRequest
) -> None:
    module = f"llava_bad_{abs(hash(text))}"
    distribution(site, "llava-bad", module, text)
    request.addfinalizer(lambda: sys.modules.pop(module, None))
    code, out, err = llava_run("plugins")
    assert code == 0
    assert sentence in out.partition("\nbroken\n")[2]
    assert "clip" in out
    assert "Traceback" not in out + err
    code, out, _ = llava_run("plugins", "--json")
    (broken,) = json.loads(out)["broken"]
    assert sentence in broken["error"]
    assert "Traceback" in llava_run("plugins", "--traceback").out


def test_two_of_one_name_fail_the_recipes_that_name_it_alone(
    site: Path, llava_run: Command, write_recipe: RecipeWriter, request: pytest.FixtureRequest
) -> None:
    distribution(
        site, "llava-bad", "llava_bad_twin", MINE.format(name="mlp", hook="llava_connectors")
    )
    request.addfinalizer(lambda: sys.modules.pop("llava_bad_twin", None))
    code, _, err = llava_run(write_recipe(('use = "mlp"', 'use = "linear"')), "--plan")
    assert code == 0, err
    code, _, err = llava_run(write_recipe(), "--plan")
    assert code == 2
    assert "llavakit_plugins.connectors.mlp.Mlp of llavakit:" in err
    assert "llava_bad_twin.Mine of llava-bad:mine" in err
    assert "both called `mlp`; uninstall one of them" in err


def test_the_traceback_of_a_broken_package_is_shown_where_it_is_asked_for(
    site: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the warning of a run that goes on, and at the error of a command."""
    distribution(site, "llava-bad", "llava_bad_traced", "import math\nmath.sqrt(-1)\n")
    commands = site / "llava_bad-1.2.dist-info" / "entry_points.txt"
    commands.write_text(
        commands.read_text() + "[llavakit.commands]\nbroken = llava_bad_traced:add\n"
    )
    code, _, err = llava_run("broken")
    assert code == 2
    assert "Traceback" not in err
    assert "LLAVA_TRACEBACK=1 shows more" in err
    monkeypatch.setenv("LLAVA_TRACEBACK", "1")
    code, _, err = llava_run("broken")
    assert code == 2
    assert "Traceback" in err
    assert "math.sqrt(-1)" in err
    done = subprocess.run(
        [sys.executable, "-c", "from llavakit import Registry; Registry.installed()"],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "math.sqrt(-1)" in done.stderr


def test_a_broken_package_stops_no_recipe_that_is_not_made_of_it(
    site: Path, llava_run: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "from llavakit import hookimpl\n\nimport math\nmath.sqrt(-1)\n"
    distribution(site, "llava-bad", "llava_bad_import", text)
    recipe = tmp_path / "r.toml"
    recipe.write_text('steps = [{ use = "scenes", train = 8, single = 0, test = 8 }]')
    code, _, err = llava_run(recipe, "--out", tmp_path / "run")
    assert code == 0, err
    (said,) = {record.message for record in caplog.records if "llava-bad" in record.message}
    assert f"math domain error ({site / 'llava_bad_import.py'}, line 4)" in said
    recipe.write_text('steps = [{ use = "of-the-broken-one" }]')
    code, _, err = llava_run(recipe, "--out", tmp_path / "run")
    assert code == 2
    assert "no Step is called `of-the-broken-one`" in err
    assert "plugin `mine` of llava-bad failed to import" in err


HOOK = """\
from llavakit import hookimpl

@hookimpl
def llava_exporters():
    import nothing_of_the_kind
"""


def test_an_exception_within_a_hook_leaves_the_other_plugins_usable(site: Path) -> None:
    distribution(site, "llava-bad", "llava_bad_hook", HOOK)
    registry = Registry.installed()
    assert "onnx" in registry.all(Exporter)
    (error,) = registry.broken.values()
    assert f"{site / 'llava_bad_hook.py'}, line 5" in str(error)
    assert isinstance(error.__cause__, ModuleNotFoundError)


def test_a_component_that_cannot_be_imported_is_left_out_alone(site: Path) -> None:
    text = HOOK.replace(
        "import nothing_of_the_kind", "return {'bad': 'llava_bad_lazy_none:Bad', 'my': 'x:Y'}"
    )
    distribution(site, "llava-bad", "llava_bad_lazy", text)
    registry = Registry.installed()
    assert {"onnx", "hf"} <= set(registry.all(Exporter))
    assert "bad" not in registry.all(Exporter)
    with pytest.raises(PluginError, match="cannot load its Exporter `bad`: No module named"):
        registry.get(Exporter, "bad")


@pytest.mark.parametrize(
    ("stated", "there"),
    [
        (None, {"one", "two"}),
        ("", set()),
        (" , ", set()),
        ("llava-one", {"one"}),
        ("llava-two, llava-one", {"one", "two"}),
        ("mine", {"one", "two"}),  # the name of both entry points
    ],
)
def test_the_environment_names_the_plugins_that_are_loaded(
    site: Path, monkeypatch: pytest.MonkeyPatch, stated: str | None, there: set[str]
) -> None:
    for name in ("one", "two"):
        text = MINE.format(name=name, hook="llava_connectors")
        distribution(site, f"llava-{name}", f"llava_wanted_{name}", text)
        monkeypatch.delitem(sys.modules, f"llava_wanted_{name}", raising=False)
    if stated is not None:
        monkeypatch.setenv("LLAVA_PLUGINS", stated)
    found = set(Registry.installed().all(Connector))
    assert found & {"one", "two"} == there
    assert {"linear", "mlp"} <= found
    imported = {name for name in ("one", "two") if f"llava_wanted_{name}" in sys.modules}
    assert imported == there, "what is not named is not imported"


def test_a_plugin_that_is_named_and_not_installed(
    site: Path, monkeypatch: pytest.MonkeyPatch, llava_run: Command
) -> None:
    distribution(
        site, "llava-one", "llava_named_one", MINE.format(name="one", hook="llava_connectors")
    )
    monkeypatch.setenv("LLAVA_PLUGINS", "llava-on")
    code, _, err = llava_run("plugins")
    assert code == 2
    assert "LLAVA_PLUGINS names `llava-on`" in err
    assert "did you mean `llava-one`?" in err


def test_a_misspelt_hook_gets_a_suggestion_with_its_mark_or_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def llava_conectors() -> list[Any]:
        return []

    plugin = type("Plugin", (), {"llava_conectors": staticmethod(hookimpl(llava_conectors))})
    with pytest.raises(PluginError, match="did you mean `llava_connectors`"):
        Registry.empty().register(plugin())
    prefixed = type("Plugin", (), {"lava_steps": staticmethod(hookimpl(llava_conectors))})
    with pytest.raises(PluginError, match=r"unknown hook 'lava_steps'; did you mean `llava_steps`"):
        Registry.empty().register(prefixed())

    def llava_exporter() -> list[Any]:
        return []

    plain = type("Plugin", (), {"llava_exporter": staticmethod(llava_exporter)})
    Registry.empty().register(plain(), name="mine")
    assert "plugin mine has a function `llava_exporter`; did you mean `llava_exporters`" in (
        caplog.text
    )


def test_every_component_has_options_that_are_frozen_and_forbid_others() -> None:
    registry = Registry.installed()
    components: list[type[Component]] = [
        c for kind in all_kinds() for c in registry.all(kind).values()
    ]
    assert len(components) > 20
    for component in components:
        config = component.Options.model_config
        assert config.get("extra") == "forbid", component
        assert config.get("frozen"), component
        assert component.__doc__, component
