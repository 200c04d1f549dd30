"""Predictions: what a schedule would cost, and which balance is best. No torch in this package."""
