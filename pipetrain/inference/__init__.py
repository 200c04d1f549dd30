"""What a trained run is used for: its model gathered on one device, text made with it, and its score on a split."""
