"""A null device that writes and reads all tokens of all pages, and an engine that holds a scheduler to its promises."""

from collections import deque

from clvp_fast.engine.scheduler import Scheduler, batch_buckets


class NullDevice:
    """Do a runner's work with a `Step`, on pages that hold the names of tokens.

    length_of: (key, candidate) -> how many tokens it draws.
    """

    def __init__(self, page_size, length_of):
        self.page_size, self.length_of = page_size, length_of
        self.pages = {}  # (page, place) -> the token that was written there last
        self.prefixes = {}  # row -> (key, pages, length)
        self.slots = {}  # slot -> [key, candidate, prefix row, table, tokens stored, done]

    def apply(self, step):
        for slot in step.freed_slots:
            del self.slots[slot]
        for key, row, pages, length in step.prefills:
            assert len(pages) == -(-length // self.page_size)
            self.prefixes[row] = key, pages, length
            for place in range(length):
                self.pages[self._at(pages, place)] = (key, "prompt", place)
        for slot, key, candidate, row in step.admitted:
            assert slot not in self.slots and self.prefixes[row][0] == key
            self.slots[slot] = [key, candidate, row, [], 0, False]
        for slot, index, page in step.new_pages:
            table = self.slots[slot][3]
            assert index == len(table)
            table.append(page)
        sources, targets = ({move[side] for move in step.moves} for side in (0, 1))
        assert len(sources) == len(targets) == len(step.moves) and not sources & targets
        for source, target in step.moves:
            assert target not in self.slots and target < min(sources)
            self.slots[target] = self.slots.pop(source)
        assert step.num_slots == len(step.runs) == 1 + max(self.slots)
        for slot, run in enumerate(step.runs):
            assert (run and [run.key, run.candidate, run.slot]) == (
                [*self.slots[slot][:2], slot] if slot in self.slots else None
            )

    def decode(self):
        """Run one step of all that are not done; return the slots that are done after it."""
        alive = {slot: state for slot, state in self.slots.items() if not state[5]}
        for key, candidate, _, table, stored, _ in alive.values():
            self.pages[self._at(table, stored)] = (key, candidate, stored)
        for state in alive.values():
            key, candidate, row, table, stored, _ = state
            _, pages, length = self.prefixes[row]
            assert [self.pages[self._at(pages, i)] for i in range(length)] == [
                (key, "prompt", i) for i in range(length)
            ]
            own = range(stored + 1)
            assert [self.pages[self._at(table, i)] for i in own] == [(key, candidate, i) for i in own]
            state[4] += 1
            state[5] = state[4] == self.length_of[key, candidate]
        return [slot for slot, state in self.slots.items() if state[5]]

    def _tokens(self, table, length):
        return [self.pages[self._at(table, place)] for place in range(length)]

    def _at(self, table, place):
        return table[place // self.page_size], place % self.page_size


class Engine:
    """A scheduler and a null device, and what must be true of each step."""

    def __init__(self, num_pages, page_size, max_batch, limit, lag):
        self.scheduler = Scheduler(num_pages, page_size, max_batch, limit, lag)
        self.length_of, self.requests, self.order = {}, {}, {}
        self.device = NullDevice(page_size, self.length_of)
        self.in_flight, self.accepted, self.ended = deque(), set(), []
        self.ever_running, self.preemptions, self.prefills, self.most_steps = {}, 0, 0, 0

    def add(self, prefix_len, lengths, max_new_tokens, key=None):
        key = f"request {len(self.order)}" if key is None else key
        self.scheduler.add(key, prefix_len, len(lengths), max_new_tokens)
        self.requests[key] = set(range(len(lengths)))
        self.order[key] = len(self.order)
        self.length_of |= {(key, candidate): length for candidate, length in enumerate(lengths)}
        self.most_steps += sum(lengths) + len(lengths) * self.scheduler.lag
        return key

    def cancel(self, key):
        self.scheduler.cancel(key)
        del self.requests[key]
        self.accepted = {pair for pair in self.accepted if pair[0] != key}
        self.ever_running = {run: age for run, age in self.ever_running.items() if run.key != key}

    def schedule(self):
        before = {run for run in self.ever_running if run.slot is not None}
        step = self.scheduler.schedule()
        gone = [self.ever_running.pop(run) for run in before if run.slot is None]
        self.preemptions += len(gone)
        if step is None:
            assert not self.requests
            return False
        self.prefills += len(step.prefills)
        self._check_order(step, gone)
        self._check_buckets(step)
        self._check_pages(step)
        self.device.apply(step)
        self.in_flight.append((step, self.device.decode()))
        return True

    def advance(self, only=None):
        """Report finished slots; `only`: only these of them."""
        step, done = self.in_flight.popleft()
        reported = [slot for slot in done if not only or step.runs[slot].slot is not None]
        accepted = {(run.key, run.candidate) for run in map(step.runs.__getitem__, done) if run.slot is not None}
        assert not accepted & self.accepted
        self.accepted |= accepted
        for run in [run for run in self.ever_running if (run.key, run.candidate) in accepted]:
            del self.ever_running[run]
        ended = self.scheduler.advance(reported)
        for key in {key for key, _ in accepted}:
            finished = {candidate for other, candidate in self.accepted if other == key}
            assert (key in ended) == (finished == self.requests[key])
        assert len(set(ended)) == len(ended)
        for key in ended:
            del self.requests[key]
        self.ended += ended

    def step(self, only=None):
        more = self.schedule()
        while len(self.in_flight) > (self.scheduler.lag if more else 0):
            self.advance(only)
        return more

    def finish(self):
        """Run to the end, in no more steps than one candidate after another would take."""
        steps = 0
        while self.step():
            steps += 1
            assert steps <= self.most_steps
        pool = self.scheduler.pool
        assert not self.requests and pool.free_pages == pool.num_pages
        assert not any(pool.references(page) for page in range(pool.num_pages))
        assert self.scheduler.schedule() is None
        return self

    def _check_order(self, step, gone):
        """Check that candidates come in by age and are preempted from the youngest."""
        ages = {run: (self.order[run.key], run.candidate) for run in step.runs if run}
        entered = {(self.order[key], candidate) for _, key, candidate, _ in step.admitted}
        stayed = set(ages.values()) - entered
        assert len(set(ages.values())) == len(ages)
        assert not (gone and entered)
        assert not (stayed and gone) or max(stayed) < min(gone)
        assert not (stayed and entered) or max(stayed) < min(entered)
        finished = {(self.order[key], candidate) for key, candidate in self.accepted}
        every = {(self.order[key], i) for key, candidates in self.requests.items() for i in candidates}
        waiting = every - set(ages.values()) - finished
        assert not waiting or max(ages.values()) < min(waiting)
        self.ever_running |= ages

    def _check_buckets(self, step):
        sizes = batch_buckets(self.scheduler.max_batch)
        active = sum(run is not None for run in step.runs)
        least = min(size for size in sizes if size >= active)
        assert step.num_slots <= least
        if step.moves:
            assert max(source for source, _ in step.moves) >= least and step.num_slots == active

    def _check_pages(self, step):
        """Check for a reference from each table that names a page: a request's own, and its running candidates'."""
        pool, runs = self.scheduler.pool, [run for run in step.runs if run]
        counts = dict.fromkeys(range(pool.num_pages), 0)
        for request in {run.request for run in runs} | self.scheduler._idle:
            for page in request.prefix_pages:
                counts[page] += 1
        for run in runs:
            for page in [*run.pages, *run.request.prefix_pages]:
                counts[page] += 1
        assert {page: pool.references(page) for page in counts} == counts
        own = [page for run in runs for page in run.pages]
        assert len(set(own)) == len(own)
