"""The plugin manager behind typed functions: loads plugins one by one, and names the plugin in every fault."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from overflowml_core import environment, hookspecs
from overflowml_core.errors import OverflowmlError, PluginFault
from overflowml_core.facts import Accelerator, Limits, Machine, Network, Workload
from overflowml_core.formats import Format
from overflowml_core.plan import Plan
from overflowml_core.traps import Objection

if TYPE_CHECKING:
    from overflowml_core.codec import Codec
    from overflowml_core.loading import Loading
    from overflowml_core.plan import Estimate
    from overflowml_core.protocols import Attachment

ENTRY_POINT_GROUP = hookspecs.PROJECT
_log = logging.getLogger("overflowml")
_T = TypeVar("_T")


class Plugins:
    """All plugins of this process. ``faults`` names those that could not be loaded, with the reason."""

    def __init__(self, defaults: Mapping[str, object], load_entry_points: bool = True) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.faults: dict[str, str] = {}
        for name, plugin in defaults.items():
            self.register(plugin, name)
        if load_entry_points:
            self._load_entry_points()

    def _load_entry_points(self) -> None:
        skipped = environment.disabled_plugins()
        for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
            if entry.name in skipped or self.manager.has_plugin(entry.name):
                continue
            try:
                self.register(entry.load(), entry.name)
            except Exception as error:  # noqa: BLE001 -- a stranger's code; one broken plugin must not take the others along
                self.faults[entry.name] = f"{type(error).__name__}: {error}"
                _log.warning("plugin %s cannot be used: %s", entry.name, self.faults[entry.name])

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin.

        Raises:
            PluginFault: it implements a hook that does not exist, or asks for an argument that the hook does not have.
        """
        try:
            self.manager.register(plugin, name=name)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise PluginFault(name, "registration", str(error).replace("\n", " ")) from error
        for hook in self.manager.get_hookcallers(plugin) or ():
            if any(i.plugin_name == name and (i.wrapper or i.hookwrapper) for i in hook.get_hookimpls()):
                self.manager.unregister(name=name)
                raise PluginFault(name, hook.name, "hook wrappers are not called here; implement the hook itself")

    def names(self) -> tuple[str, ...]:
        """Names of the plugins at work, sorted."""
        return tuple(sorted(name for name, _ in self.manager.list_name_plugin()))

    # Calls go to one implementation after the other instead of through the relay, so that a fault can name its plugin.

    def _each(self, hook: str, **arguments: Any) -> Iterable[tuple[str, Any]]:
        caller = getattr(self.manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            accepted = {name: arguments[name] for name in implementation.argnames}
            try:
                answer = implementation.function(**accepted)
            except (OverflowmlError, KeyboardInterrupt, SystemExit):
                raise
            except Exception as error:
                raise PluginFault(implementation.plugin_name, hook, f"{type(error).__name__}: {error}") from error
            yield implementation.plugin_name, answer

    def _first(self, hook: str, kind: type[_T], **arguments: Any) -> _T | None:
        for name, answer in self._each(hook, **arguments):
            if answer is not None:
                return _expect(answer, kind, name, hook)
        return None

    def _tell(self, hook: str, **arguments: Any) -> None:
        caller = getattr(self.manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            try:
                implementation.function(**{name: arguments[name] for name in implementation.argnames})
            except Exception:  # noqa: BLE001 -- a watcher must not disturb the work
                _log.exception("plugin %s, %s failed", implementation.plugin_name, hook)

    def accelerators(self) -> list[Accelerator]:
        """All accelerators that plugins name."""
        found: list[Accelerator] = []
        for name, answer in self._each("overflowml_accelerators"):
            for accelerator in answer or ():
                found.append(_expect(accelerator, Accelerator, name, "overflowml_accelerators"))
        return found

    def describe(self, source: object, workload: Workload, options: dict[str, object]) -> Network | None:
        """The first description, None where no plugin knows the source."""
        return self._first("overflowml_describe", Network, source=source, workload=workload, options=options)

    def measure(self, source: object, network: Network, workload: Workload, options: dict[str, object]) -> Network | None:
        """The network with the first profile of it, None where no plugin can profile this source.

        Raises:
            PluginFault: the plugin changed more than profiles.
        """
        for name, answer in self._each("overflowml_measure", source=source, network=network, workload=workload, options=options):
            if answer is not None:
                measured = _expect(answer, Network, name, "overflowml_measure")
                if [c.fingerprint for c in measured.components] != [c.fingerprint for c in network.components]:
                    raise PluginFault(name, "overflowml_measure", "changed the network that it was to profile")
                return measured
        return None

    def formats(self, machine: Machine) -> tuple[Format, ...]:
        """All formats that plugins name.

        Raises:
            PluginFault: two plugins name the same one.
        """
        found: dict[str, tuple[str, Format]] = {}
        for name, answer in self._each("overflowml_formats", machine=machine):
            for item in answer or ():
                form = _expect(item, Format, name, "overflowml_formats")
                if form.name in found:
                    raise PluginFault(name, "overflowml_formats", f"names {form.name!r}, which plugin {found[form.name][0]} names too")
                found[form.name] = (name, form)
        return tuple(form for _, form in found.values())

    def plan(
        self,
        network: Network,
        machine: Machine,
        workload: Workload,
        limits: Limits,
        formats: tuple[Format, ...] = (),
        abilities: frozenset[str] = frozenset(),
    ) -> Plan | None:
        """The first plan, checked."""
        arguments = {"network": network, "machine": machine, "workload": workload, "limits": limits}
        plan = self._first("overflowml_plan", Plan, **arguments, formats=formats, abilities=abilities)
        return None if plan is None else plan.check()

    def objections(self, plan: Plan, network: Network, machine: Machine) -> list[Objection]:
        """All objections to a plan."""
        found: list[Objection] = []
        for name, answer in self._each("overflowml_objections", plan=plan, network=network, machine=machine):
            found += [_expect(objection, Objection, name, "overflowml_objections") for objection in answer or ()]
        return found

    def codec(self, form: Format, machine: Machine) -> Codec | None:
        """The first that converts weights into a format, None where no plugin does."""
        from overflowml_core.codec import Codec

        return self._first("overflowml_codec", Codec, format=form, machine=machine)  # type: ignore[type-abstract]

    def components(self, target: object) -> dict[str, object] | None:
        """The first answer to which modules a live object consists of."""
        return self._first("overflowml_components", dict, target=target)

    def attached(self, target: object, attachment: Attachment) -> None:
        """Let every host do what it needs beyond streaming."""
        for _ in self._each("overflowml_attached", target=target, attachment=attachment):
            pass

    def install_hosts(self) -> None:
        """Put the requests into all hosts."""
        for _ in self._each("overflowml_install_host"):
            pass

    def uninstall_hosts(self) -> None:
        """Take them out again."""
        for _ in self._each("overflowml_uninstall_host"):
            pass

    def planned(self, plan: Plan) -> None:
        """Tell watchers of a plan."""
        self._tell("overflowml_planned", plan=plan)

    def progress(self, loading: Loading | None, done_bytes: int, total_bytes: int) -> None:
        """Tell watchers how far a load is."""
        self._tell("overflowml_progress", loading=loading, done_bytes=done_bytes, total_bytes=total_bytes)

    def register_commands(self, app: object) -> None:
        """Let plugins add commands."""
        self._tell("overflowml_register_commands", app=app)

    def ran(self, plan: Plan, report: Estimate) -> None:
        """Tell watchers what was measured."""
        self._tell("overflowml_ran", plan=plan, report=report)


def _expect(answer: object, kind: type[_T], plugin: str, hook: str) -> _T:
    if not isinstance(answer, kind):
        raise PluginFault(plugin, hook, f"returned a {type(answer).__name__}, expected {kind.__name__} or None")
    return answer
