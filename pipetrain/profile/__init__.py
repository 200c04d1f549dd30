"""What the layers of a model cost: measured on the device that will run them, or computed for one that is described."""
