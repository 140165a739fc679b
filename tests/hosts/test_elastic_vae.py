"""A VAE that runs out of memory with nothing left to stream: slices of the batch, then tiles where the plan may change pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import torch

import overflowml
from overflowml_diffusers.lighter import VaeLighter
from tests.hosts import pipeline_makers, pipelines
from tests.hosts.check import whole_blocks
from tests.hosts.fault_lives import on_virtual
from tests.runtime.conftest import Virtual, vgpu  # noqa: F401 -- a fixture

pytestmark = pytest.mark.usefixtures("unprofiled")
Saved = Callable[..., Path]


@pytest.fixture
def simulated(vgpu: Virtual) -> Iterator[Virtual]:  # noqa: F811 -- as fixtures are used
    with on_virtual(vgpu.device):
        yield vgpu


def settings(vae: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}


def latents(batch: int = 1, side: int = 24) -> torch.Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(2))


def kinds(vae: Any) -> list[str]:
    return [event.kind for event in overflowml.attachment(vae).events]


def decode(vae: Any, of: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(of).sample.cpu()


def peak_of(simulated: Virtual, vae: Any, of: torch.Tensor) -> int:
    simulated.limit(1 << 30)
    decode(vae, of)
    return simulated.peak_bytes


def managed(folder: Path, quality: str) -> Any:
    """In the least memory: nothing can be streamed that is not."""
    least = whole_blocks(folder).device_bytes
    return df.AutoencoderKL.from_pretrained(folder, overflow=overflowml.Limits.exactly(least, reserve=0, quality=quality))


def test_a_picture_is_decoded_in_tiles_where_the_whole_does_not_fit(saved_pipeline: Saved, simulated: Virtual) -> None:
    vae = managed(saved_pipeline("stable_diffusion") / "vae", "minimal")
    before, of = settings(vae), latents().to("vgpu")
    whole = decode(vae, of)
    simulated.limit(peak_of(simulated, vae, of) * 3 // 4)
    tiled = decode(vae, of)
    assert kinds(vae)[-2:] == ["lightened", "retried"]
    (event,) = [event for event in overflowml.attachment(vae).events if event.kind == "lightened"]
    assert "tiles of 32 pixels" in event.reason
    assert "not identical" in event.reason
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    simulated.limit(1 << 30)
    plain = df.AutoencoderKL.from_pretrained(saved_pipeline("stable_diffusion") / "vae").to("vgpu")
    plain.enable_tiling()
    assert torch.equal(tiled, decode(plain, of))  # just what the host's own tiles give
    overflowml.release(vae)
    assert settings(vae) == before


def test_smaller_tiles_follow_where_those_do_not_fit_either_and_then_the_error(saved_pipeline: Saved, simulated: Virtual) -> None:
    vae = managed(saved_pipeline("stable_diffusion") / "vae", "any")
    before, of = settings(vae), latents().to("vgpu")
    vae.enable_tiling()
    tiles = peak_of(simulated, vae, of)
    vae.use_tiling = False
    simulated.limit(tiles - 4096)
    decode(vae, of)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (True, 16, 8)
    assert kinds(vae).count("lightened") == 2
    simulated.limit(simulated.taken_bytes + 4096)
    with pytest.raises(torch.OutOfMemoryError, match="no block of AutoencoderKL can leave"):
        decode(vae, of)
    overflowml.release(vae)
    assert settings(vae) == before


def test_a_lossless_plan_slices_the_batch_and_tiles_nothing(tmp_path: Path, simulated: Virtual) -> None:
    pipeline_makers.unattended_vae().save_pretrained(tmp_path)
    vae = managed(tmp_path, "lossless")
    before, of = settings(vae), latents(4).to("vgpu")
    each = torch.cat([decode(vae, of[k : k + 1]) for k in range(4)])
    simulated.limit(peak_of(simulated, vae, of) // 2)
    assert torch.equal(decode(vae, of), each)
    assert (vae.use_slicing, vae.use_tiling) == (True, False)
    simulated.limit(simulated.taken_bytes + 4096)
    with pytest.raises(torch.OutOfMemoryError):
        decode(vae, of)
    assert not vae.use_tiling
    overflowml.release(vae)
    assert settings(vae) == before


def test_whole_pictures_are_tried_again_after_a_while_and_then_less_often(saved_pipeline: Saved, simulated: Virtual) -> None:
    vae = managed(saved_pipeline("stable_diffusion") / "vae", "minimal")
    of = latents().to("vgpu")
    whole = decode(vae, of)
    short = peak_of(simulated, vae, of) * 3 // 4
    simulated.limit(short)
    for calls in (4, 7):  # the retried one counts
        for _ in range(calls):
            decode(vae, of)
        assert vae.use_tiling
        before = len(kinds(vae))
        decode(vae, of)  # tries the whole, and cannot
        assert kinds(vae)[before:] == ["unlightened", "lightened", "retried"]
    simulated.limit(1 << 30)
    for _ in range(15):
        decode(vae, of)
    assert vae.use_tiling
    assert torch.equal(decode(vae, of), whole)
    assert not vae.use_tiling
    overflowml.release(vae)


@pytest.mark.parametrize("name", ["stable_diffusion", "sana", "wan", "ltx"])
def test_steps_end_and_leave_every_kind_of_vae_as_it_was(name: str) -> None:
    vae = pipelines.FAMILIES[name].make().vae
    before, steps = settings(vae), 0
    lighter = VaeLighter(vae, may_tile=True)
    told = lighter.step((torch.zeros(2, 4, 8, 8),))
    while told:
        steps += 1
        assert steps < 12
        told = lighter.step((torch.zeros(2, 4, 8, 8),))
    assert steps >= 2
    assert vae.use_tiling
    lighter.undo()
    lighter.undo()
    assert settings(vae) == before
