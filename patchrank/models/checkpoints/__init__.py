"""Weights of CLIP's towers: read from files of any origin and from the hub, and saved to a directory."""
