"""A runtime with memory for so many items, which keeps what it is told."""

from fewstep_sr.tiling.batching import Runtime


class Memory(Runtime):
    """A call may hold ``fits`` items, as it tells :meth:`use`; MemoryError is out of memory."""

    def __init__(self, fits: int = 1000):
        self.fits, self.told, self.freed, self.calls, self.total = fits, [], 0, 0, None

    def before_call(self):
        self.calls += 1

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)

    def free_memory(self):
        self.freed += 1

    def progress(self, total):
        self.total = total
        return self.told.append

    def use(self, n: int) -> None:
        if n > self.fits:
            raise MemoryError
