"""The study: six real targets, an ImageNet-trained network, every method. See RESULTS.md here."""
