"""Batches of work on a cluster, through Ray. Importing it imports neither Ray nor torch."""
