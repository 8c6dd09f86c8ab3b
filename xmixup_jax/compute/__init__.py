"""Everything that is computed on the devices."""
