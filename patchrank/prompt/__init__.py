"""Phase III: learned tokens for both towers, tuned on a few images of each class while all else stays frozen."""
