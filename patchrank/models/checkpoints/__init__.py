"""Weights of CLIP's towers: from files of any origin, from the hub, and back to a directory."""
