"""HTTP over the engine: OpenAI's completions and chat, and a page to chat with."""
