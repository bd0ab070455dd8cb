"""Latents of pictures on the disk: their files, the command that makes them, the dataset that reads them."""
