"""Runs a model under several plans and measures its passes, for ``overflowml tune``. Imports torch and hosts inside functions only."""
