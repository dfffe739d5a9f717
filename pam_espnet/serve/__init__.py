"""A trained model behind HTTP, with the routes of OpenAI's API."""
