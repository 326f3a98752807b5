"""A local server: a page to play with, and the endpoints that OpenAI-style clients speak.

Nothing here changes a weight, and nothing that a client sends names a file.
Read `row_cache` first (rows that come and go in one key-value cache), then `engine` (decodes the
requests of all clients together), `requests` (what clients may ask, checked), `responses` (their
answers), `chat` (messages as a prompt), `app` (the web application) and `playground` (its page).
"""
