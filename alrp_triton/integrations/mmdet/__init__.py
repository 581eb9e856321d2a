"""Ranking losses for MMDetection 3.x."""
