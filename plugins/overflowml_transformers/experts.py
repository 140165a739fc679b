"""Routed experts behind transformers' experts interface: "overflowml" as one more implementation of them.

A model whose experts are apart is switched to it by its configuration, as the host's own implementations are. Modules that are not managed,
under a configuration that they share with one that is, go on with the implementation that was chosen before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from overflowml_core.errors import Managed, Unsupported

NAME = "overflowml"

_CALL = "_overflowml_experts"
"""Where a managed module carries what computes for it, and a configuration the implementation that it had."""


_HOST = "host"
_users: set[object] = set()
"""Who needs the implementation: the installed host, and each managed model."""


def register(module: ModuleType, user: object = _HOST) -> None:
    """Make the implementation known to the host.

    Args:
        module: ``transformers.integrations.moe``.
        user: for whom; it stays known until the last one has had it made unknown.
    """
    _users.add(user)
    module.ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def unregister(module: ModuleType, user: object = _HOST) -> None:
    """Make it unknown again, if nobody else needs it and it is still ours."""
    _users.discard(user)
    mapping = type(module.ALL_EXPERTS_FUNCTIONS)._global_mapping
    if not _users and mapping.get(NAME) is forward:
        del mapping[NAME]


def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute with routed experts wherever they are. Arguments and result as for the host's own implementations:

    Args:
        self: the module.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) numbers of experts.
        top_k_weights: (tokens, k).
        args, kwargs: what the host hands over beyond these.

    Raises:
        Unsupported: the module is managed, and something stands between it and its weights.
    """
    call = vars(self).get(_CALL)
    if call is None:
        call = _former(self)
    elif "parametrizations" in self._modules:  # torch.nn.utils.parametrize, by which PEFT adds adapters to parameters
        raise Unsupported(
            f"{type(self).__name__}: its weights are parametrized, as by adapters on experts, and experts that are apart from their block "
            "compute with what they were; merge the adapter into the model before it is managed, or release the model"
        )
    return call(self, hidden_states, top_k_index, top_k_weights, *args, **kwargs)


def _former(module: Any) -> Callable[..., Any]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager: Callable[..., Any] = type(module).forward.__wrapped__
    name = vars(module.config).get(_CALL, "eager")
    found: Callable[..., Any] = eager if name in ("eager", NAME) else ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)
    return found


def take_over(model: Any, attachment: Any) -> Callable[[], None]:
    """Switch a model to our implementation.

    Args:
        model: managed.
        attachment: its engine, which knows the modules whose experts are apart.

    Returns:
        A function that switches it back.
    """
    from transformers.integrations import moe

    found = attachment.experts.callers()
    user = object()
    if found:
        register(moe, user)
    configs: dict[int, tuple[Any, Any]] = {}
    for module, call in found:
        config = module.config
        if id(config) not in configs:
            configs[id(config)] = (config, config._experts_implementation)
        vars(module)[_CALL] = call
        attachment.experts.adds_by_expert(module, configs[id(config)][1] == "eager")
    for config, before in configs.values():
        vars(config)[_CALL] = before
        config._experts_implementation = NAME

    if found and hasattr(type(model), "set_experts_implementation"):
        vars(model)["set_experts_implementation"] = _refuse

    def undo() -> None:
        vars(model).pop("set_experts_implementation", None)
        for module, _ in found:
            vars(module).pop(_CALL, None)
        for config, before in configs.values():
            vars(config).pop(_CALL, None)
            if config._experts_implementation == NAME:
                config._experts_implementation = before
        unregister(moe, user)

    return undo


def _refuse(implementation: object) -> None:
    raise Managed("model", f"model.set_experts_implementation({implementation!r})")
