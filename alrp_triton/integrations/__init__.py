"""Adapters for the losses in existing detectors; each module imports its own framework."""
