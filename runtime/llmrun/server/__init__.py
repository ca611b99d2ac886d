"""The HTTP server: OpenAI's interface to one engine. Nothing here computes; nothing outside `commands.serve` imports it.

protocol.py guard.py   what reaches the application: limits of connections, time, size; host, origin, key
json_body.py fields.py schemas.py openapi.py   bytes to checked parameters, from one table of fields
responses_input.py   the newer interface's requests as those of a chat
prompts.py tools.py grammar.py   parameters to token ids and constraints
tasks.py chat_work.py tool_stream.py   parameters to tickets of the engine's loop, and their events back
completions.py chats.py responses_api.py replies.py   events to OpenAI's objects and streams
metrics.py service.py app.py   numbers, life and death, routes
"""
