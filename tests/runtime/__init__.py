"""Tests of the engine, on the CPU and on the virtual accelerator."""
