"""Hosts' models whose calls are made to fail, on the virtual accelerator: loaded, run, given an adapter, released."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

import overflowml
from overflowml_core import planning, session
from overflowml_core.runtime.device import Device
from tests.hosts import models, pipelines
from tests.hosts.check import whole_blocks
from tests.runtime.build import machine

STAGES = ("load", "first pass", "later pass", "adapter", "remove")


@contextlib.contextmanager
def on_virtual(device: Device) -> Iterator[None]:
    """Have the virtual accelerator be what is detected, and the inputs of all families on it."""
    found = machine(device)
    where = device.torch_device
    with (
        mock.patch.object(planning, "detect", return_value=found),
        mock.patch.object(session, "detect", return_value=found),
        mock.patch.object(pipelines, "TOKENS", pipelines.TOKENS.to(where)),
        mock.patch.object(models, "TOKENS", models.TOKENS.to(where)),
    ):
        yield


class HostSubject:
    """A model or pipeline of a host in a folder.

    Attributes:
        load: the host's own, given the folder.
        options: what it needs beside.
        limits: for the managed one.
        run: gives a tensor.
        adapt: loads an adapter; ``unload`` takes it out, and does nothing where there is none.
    """

    def __init__(
        self,
        load: Callable[..., Any],
        folder: Path,
        options: Mapping[str, Any],
        run: Callable[[Any], torch.Tensor],
        adapt: Callable[[Any], object],
        unload: Callable[[Any], object],
    ) -> None:
        self.stages = STAGES
        self.run, self.adapt, self.unload = run, adapt, unload
        self._load, self._folder, self._options = load, folder, dict(options)
        self.limits = overflowml.Limits.exactly()
        plain = load(folder, **self._options).to("vgpu")
        first = self.result(plain)
        adapt(plain)
        self.expected = {"first pass": first, "later pass": first, "adapter": self.result(plain)}
        assert not torch.equal(first, self.expected["adapter"])
        unload(plain)
        self.weights = {name: value.cpu() for name, value in state_of(plain).items()}

    def within(self, room_bytes: int, host_bytes: int | None = None) -> HostSubject:
        """Manage it in the least memory that holds whole blocks and so much more; ``host_bytes`` is what RAM may hold of it."""
        device_bytes = whole_blocks(self._folder, room_bytes, **self._options).device_bytes
        self.limits = overflowml.Limits.exactly(device_memory=device_bytes, reserve=0, host_memory=host_bytes)
        return self

    def result(self, model: Any) -> torch.Tensor:
        """What a run gives, on the CPU."""
        with torch.no_grad():
            return self.run(model).cpu()

    def load(self) -> Any:
        """The managed model."""
        return self._load(self._folder, overflow=self.limits, **self._options)

    def begin(self) -> HostLife:
        """See :class:`tests.runtime.fault_points.Subject`."""
        return HostLife(self)


class HostLife:
    """See :class:`tests.runtime.fault_points.Life`."""

    def __init__(self, subject: HostSubject) -> None:
        self._subject = subject
        self._model: Any = None

    @property
    def steps(self) -> Mapping[str, Callable[[], torch.Tensor | None]]:
        """By stage what is done in it."""
        return {
            "load": self._load,
            "first pass": lambda: self._subject.result(self._model),
            "later pass": lambda: self._subject.result(self._model),
            "adapter": self._adapt,
            "remove": self._remove,
        }

    def _load(self) -> None:
        self._model = self._subject.load()

    def _adapt(self) -> torch.Tensor:
        self._subject.adapt(self._model)
        return self._subject.result(self._model)

    def _remove(self) -> None:
        if self._model is not None:
            self._subject.unload(self._model)
            overflowml.release(self._model)

    def recover(self, stage: str) -> None:
        """Take out an adapter that may be in half; without it everything is as before."""
        if stage == "adapter":
            self._subject.unload(self._model)

    def remainder(self) -> str:
        """Whether the weights are those of the files."""
        if overflowml.attachment(self._model) is not None:
            return "it is still managed"
        found = state_of(self._model)
        if found.keys() != self._subject.weights.keys():
            return f"weights have other names: {sorted(found.keys() ^ self._subject.weights.keys())[:3]}"
        for name, wanted in self._subject.weights.items():
            if found[name].device.type != "cpu" or not torch.equal(found[name], wanted):
                return f"{name} has another value or is on {found[name].device}"
        return ""


def llama_subject(folder: Path) -> HostSubject:
    """A transformers model that decodes three tokens with its cache, saved in an empty folder."""
    models.build("llama").save_pretrained(folder / "model")
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(models.build("llama"), config).save_pretrained(folder / "adapter")

    def unload(model: Any) -> None:
        if getattr(model, "_hf_peft_config_loaded", False):
            model.delete_adapter("default")

    return HostSubject(
        transformers.AutoModelForCausalLM.from_pretrained,
        folder / "model",
        {},
        lambda model: model.generate(models.TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False),
        lambda model: model.load_adapter(str(folder / "adapter")),
        unload,
    )


def flux_subject(folder: Path) -> HostSubject:
    """A diffusers pipeline that makes an image in two steps, saved in an empty folder."""
    pipe = pipelines.build("flux")
    pipe.save_pretrained(folder)
    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear"], init_lora_weights=False))
    state = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(pipe.transformer, adapter_name="default").items()}
    return HostSubject(
        diffusers.DiffusionPipeline.from_pretrained,
        folder,
        pipelines.without_tokenizers("flux"),
        lambda model: pipelines.run("flux", model),
        lambda model: model.load_lora_weights(dict(state), adapter_name="a"),
        lambda model: model.unload_lora_weights(),
    )


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """All weights of a model or of a pipeline's components, by the names that they had before an adapter was around."""
    parts = {"": model} if isinstance(model, nn.Module) else model.components
    states = {part: module.state_dict() for part, module in parts.items() if isinstance(module, nn.Module)}
    return {f"{part}.{name}".replace(".base_layer.", "."): value for part, state in states.items() for name, value in state.items()}
