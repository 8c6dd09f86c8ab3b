"""Where images come from and how they reach the device as uint8 batches."""
