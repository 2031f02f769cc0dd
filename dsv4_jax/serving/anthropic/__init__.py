"""The Anthropic shape of the API, for the agents that speak it."""
