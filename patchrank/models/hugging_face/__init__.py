"""Models of Hugging Face's transformers by name: their image towers, their text towers and how they prepare images."""
