"""The openai engine: requests are run by a server that speaks the OpenAI API."""
