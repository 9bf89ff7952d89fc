"""Which masks run in a step, where more of them have requests than there are slots.

vLLM lets as many masks into a step as there are slots, and keeps those that are in for as long as they have
requests: a few hot masks would keep all others out for ever. Here masks take turns. `Turns` is the policy,
and knows nothing of vLLM; `MaskScheduler` tells it which masks have requests and holds the others back.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from server.engine.plugin import end_with_parent, leave_interrupts_to_parent


class Turns:
    """Whose turn it is.

    A mask with requests gets a place at once while one is free, and keeps it while it has requests and
    nobody waits. Where a mask waits, the one whose turn has lasted longest, and for `steps` steps at least,
    gives its place to the one that has waited longest, and queues behind it. A mask without requests gives
    its place up.

    The bound: where M masks wait for S places, the last of them has its turn ceil(M / S) * steps steps later
    at the latest, whatever comes after it. While anybody waits each place changes hands every `steps` steps,
    and who comes later queues behind.
    """

    def __init__(self, slots: int, steps: int) -> None:
        self.slots = slots
        self.steps = steps
        self.step = 0
        self.since: dict[int, int] = {}  # mask -> step in which its turn began, longest first
        self.waiting: dict[int, None] = {}  # longest first
        self.places = slots

    def begin_step(self, wanted: Iterable[int], pinned: Collection[int] = ()) -> list[int]:
        """Settle whose turn the coming step is, and return the masks whose wait it ends.

        `wanted` are the masks that have requests, in the order in which they would be served.
        """
        self.step += 1
        self.places = self.slots - len(pinned)
        wanted = dict.fromkeys(mask for mask in wanted if mask not in pinned)
        self.since = {mask: since for mask, since in self.since.items() if mask in wanted}
        waited = {mask: None for mask in self.waiting if mask in wanted}
        self.waiting = waited | {mask: None for mask in wanted if mask not in self.since}
        asking = len(self.waiting)
        for mask, since in list(self.since.items()):
            free = self.places - len(self.since)
            # Negative where a mask was pinned since: its place is gone at once.
            if free >= 0 and (free >= asking or self.step - since < self.steps):
                break
            del self.since[mask]
            self.waiting[mask] = None
        begun = list(self.waiting)[: max(self.places - len(self.since), 0)]
        for mask in begun:
            del self.waiting[mask]
            self.since[mask] = self.step
        return [mask for mask in begun if mask in waited]

    def admits(self, mask: int) -> bool:
        """Whether it is the mask's turn, which begins now if a place is free."""
        if mask not in self.since and len(self.since) < self.places:
            self.since[mask] = self.step
        return mask in self.since

    def end(self) -> None:
        """Let every turn be over in the next step, for whom it may concern."""
        self.since = dict.fromkeys(self.since, self.step - self.steps)


class MaskScheduler(Scheduler):
    """vLLM's scheduler, with turns. While no mask waits for its turn, every step is the one vLLM would make.

    Of a mask whose turn it is not, waiting requests are not admitted and running ones, half-read prompts too,
    stand still: they keep their KV blocks unless somebody needs them. The dense base needs no turn.

    A turn that comes after a wait, or while others wait, begins with the mask's oldest request: once a turn
    it goes ahead of the queue, and where those that run leave it no place or no KV blocks, some are put back
    into the queue: the ones that stand still first, then those of whoever has most. So `Turns`' bound is
    also the one for a mask's first step, given as many sequences (`--max-num-seqs`) as slots; only prompts
    that were begun before and take all tokens of a step add to it. With `--scheduling-policy priority` masks
    take turns too, and priorities decide the rest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # here, as an engine that was forked loads no plugin again
        leave_interrupts_to_parent()
        self.turns = Turns(self.lora_config.max_loras, self.vllm_config.additional_config["turn_steps"])
        self.let_in: dict[int, int] = {}  # mask -> beginning of the turn in which room was made for it
        # Always in a slot: they need no turn, and leave at least one of the slots to the others.
        self.pinned: set[int] = set()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        ready = [r for r in self.requests.values() if not self._is_blocked_waiting_status(r.status)]
        waited = self.turns.begin_step(filter(None, map(mask_of, ready)), self.pinned)
        if self.turns.waiting:
            self._pause()
        if self.policy == SchedulingPolicy.FCFS and (waited or self.turns.waiting):
            self._let_in(list(self.turns.since) if self.turns.waiting else waited)
        output = super().schedule(throttle_prefills)
        if self.turns.waiting and not output.total_num_scheduled_tokens:
            self.turns.end()  # nothing of theirs can run now
        return output

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM asks for every waiting request whether it can be admitted in this step."""
        return super()._handle_blocked_waiting_request(request) and self._has_turn(request)

    def _has_turn(self, request: Request) -> bool:
        mask = mask_of(request)
        return not mask or mask in self.pinned or self.turns.admits(mask)

    def _pause(self) -> None:
        """Hold back the running requests whose turn it is not, and let KV blocks be taken from them first."""
        share = Counter(map(mask_of, self.running))
        paused = {request for request in self.running if not self._has_turn(request)}
        for request in paused:
            request.next_decode_eligible_step = self.current_step + 2  # not in the step about to begin
        # vLLM takes blocks from the last request of this list.
        self.running.sort(key=lambda request: (request in paused, share[mask_of(request)]))

    def _let_in(self, masks: Iterable[int]) -> None:
        """Make room for the oldest request of each mask that has none running, once in a turn."""
        running = set(map(mask_of, self.running))
        oldest: dict[int, Request] = {}
        for request in self.waiting:
            if not self._is_blocked_waiting_status(request.status):
                oldest.setdefault(mask_of(request), request)
        places, blocks = 0, 0
        first: list[Request] = []
        for mask in masks:
            since = self.turns.since[mask]
            if mask in running or mask not in oldest or self.let_in.get(mask) == since:
                continue
            self.let_in[mask] = since
            places += 1
            blocks += self._request_remaining_blocks(oldest[mask])
            if self._put_back(places, blocks):
                first.append(oldest[mask])
        self.let_in = {mask: since for mask, since in self.let_in.items() if mask in self.turns.since}
        for request in reversed(first):
            self.waiting.remove_request(request)
            self.waiting.prepend_request(request)

    def _put_back(self, places: int, blocks: int) -> bool:
        """Put running requests back into the queue until so much is free, if there is so much."""
        pool = self.kv_cache_manager.block_pool
        if places > self.max_num_active_reqs or blocks >= pool.num_gpu_blocks:  # one block is never used
            return False
        while self.running and (
            len(self.running) + places > self.max_num_active_reqs or blocks > pool.get_num_free_blocks()
        ):
            request = self.running.pop()
            # As vLLM does in `reset_prefix_cache`: the request may be resumed in this very step.
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        return True


class AsyncMaskScheduler(MaskScheduler, AsyncScheduler):
    """The same where vLLM schedules a step ahead, as on GPUs."""


def pin_mask(core: EngineCore, mask_id: int, pinned: bool) -> None:
    """A method that the plugin gives `EngineCore`, which has the scheduler and reaches the workers."""
    core.scheduler.pinned.discard(mask_id)
    core.model_executor.collective_rpc("pin_mask", args=(mask_id, pinned))
    if pinned:  # and in a slot: a worker that cannot raises
        core.scheduler.pinned.add(mask_id)


def mask_of(request: Request) -> int:
    """The mask's id, 0 for the dense base."""
    return request.lora_request.lora_int_id if request.lora_request else 0
