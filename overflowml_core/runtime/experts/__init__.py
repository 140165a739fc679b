"""Routed experts kept apart from their blocks: records outside the device, a cache of them on it, and who computes with them."""
