"""The demonstration: a pretrained model before and after the swap, on real sentences (`fastattn demo`)."""
