"""The timm plugin and the image-text pair."""
