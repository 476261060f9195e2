"""Schedules as data: what each rank of a pipeline does, in which order, and the proof that it can.

Pure Python that knows nothing of models or messages. A generator returns a `Schedule`; `lower` adds the messages;
`check` proves it; the executor in ``pipeline/`` walks it.
"""
