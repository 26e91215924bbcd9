"""From a request's body to sequences of tokens, and from tokens to text: fields, options, prompts, grammars, stops.

Knows of HTTP only how errors are answered (`errors`).
"""
