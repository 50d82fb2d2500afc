"""Networks and losses: backbone, projection, the segmenter that joins them, and the loss functions."""
