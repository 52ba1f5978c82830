"""Messages to token ids, and tokens to pieces of text, reasoning and tool calls."""
