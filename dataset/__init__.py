"""Images and labels: splits, datasets, joint transforms, loaders, and the drawn demo images."""
