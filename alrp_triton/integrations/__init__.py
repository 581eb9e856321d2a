"""Adapters that put the losses into existing detectors; each module imports its own framework."""
