"""Candidates, sensitivity, allocation and the study."""
