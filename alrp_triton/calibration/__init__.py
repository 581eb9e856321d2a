"""Scores as probabilities: maps from a detector's scores, fitted on its validation detections."""

from .fitting import expected_calibration_error, fit, fit_matched
from .folding import fold
from .maps import Affine, Calibration, Isotonic

__all__ = ["Affine", "Calibration", "Isotonic", "expected_calibration_error", "fit", "fit_matched", "fold"]
