"""Stages: the named steps of a pipeline, each with its own components."""
