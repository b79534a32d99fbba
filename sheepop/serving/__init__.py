"""A model behind an HTTP API that OpenAI's clients speak, with a page to try it."""
