"""Text to tokens and back: tokenizer, prompt format, replies and tool calls."""
