"""Graph passes that make a decode step over a static cache, for exactly one new token."""
