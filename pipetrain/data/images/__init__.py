"""Images with class labels: the sets, how they are read, and batches of them."""
