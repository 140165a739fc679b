"""The hosts as users meet them: transformers and diffusers with tiny models, on a machine without an accelerator."""
