"""gemma-tune: from your own data to a fine-tuned Gemma running in Ollama."""

__version__ = "0.1.0"
