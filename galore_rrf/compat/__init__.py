"""Other packages' interfaces, on this package's optimizers."""
