"""The console: pages for marketers in the HTTP server.

It holds no rule of its own: every page calls the services as a caller from outside would, in the name of whoever is signed
in, and shows what they answer or refuse.
"""
