"""Reports: one HTML file that shows a run, or a comparison, without the network."""
