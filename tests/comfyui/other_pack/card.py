"""Has the host believe that its CPU is a card with so much memory: then its estimating engine keeps and streams weights as it does on one.

Its real code runs; weights that it streams are cast for each call, as they are from RAM to a card.
"""

from __future__ import annotations


def pretend(nbytes):
    """From now on."""
    import comfy.model_management as management

    real_load, is_cpu = management.load_models_gpu, management.is_device_cpu
    management.vram_state = management.set_vram_to

    def free(dev=None, torch_free_too=False):
        held = sum(int(one.model_loaded_memory()) for one in management.current_loaded_models if one.model is not None)
        return (nbytes - held, nbytes - held) if torch_free_too else nbytes - held

    def load(*arguments, **named):
        management.is_device_cpu = lambda device: False
        try:
            return real_load(*arguments, **named)
        finally:
            management.is_device_cpu = is_cpu

    management.get_free_memory, management.load_models_gpu = free, load
