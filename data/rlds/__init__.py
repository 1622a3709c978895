"""Episodes as a TFDS data set in RLDS form. The builder needs a package folder of its own."""
