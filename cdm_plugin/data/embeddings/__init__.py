"""Text embeddings on the disk: their files, the dataset that reads them, the command that makes them, who made them."""
