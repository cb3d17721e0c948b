"""Reads model directories as Hugging Face users have them: ``config.json``, safetensors, their index."""
