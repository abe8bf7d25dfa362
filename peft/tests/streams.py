"""Stand-ins for CUDA's streams and events, which tell a time of their own."""


class Event:
    time, finished = 0.0, True

    def __init__(self, enable_timing=False):
        self.timed = enable_timing

    def query(self):
        return self.finished

    def elapsed_time(self, later):
        assert self.timed and later.timed
        return later.time - self.time


class Stream:
    """Has come to ``time``; ``step`` is for whoever lets it compute."""

    def __init__(self):
        self.time, self.step = 0.0, 0.0

    def record_event(self, event=None):
        event = event or Event()
        event.time = self.time
        return event

    def wait_event(self, event):
        self.time = max(self.time, event.time)

    def wait_stream(self, other):
        self.time = max(self.time, other.time)
