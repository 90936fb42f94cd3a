"""Methods: one short file each that reads like its paper. `train` runs any of them."""
