"""LRP: what a detector gets wrong, from COCO-format ground truth and detections."""
