"""Masks take turns: the policy by hand, and vLLM's real scheduler without a model."""

import copy
import random
from collections import deque
from itertools import count
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from maskllm.core.base import find
from server.engine.scheduler import AsyncMaskScheduler, MaskScheduler, Turns, mask_of

BASE = find("examples/demo/base")
BLOCK = 16
TURN = 8


# The policy alone.


def test_five_masks_on_two_slots_take_turns_of_three_steps():
    turns = Turns(slots=2, steps=3)
    whose = []
    for _ in range(12):
        turns.begin_step([1, 2, 3, 4, 5])
        whose.append(set(turns.since))
    assert whose == [{1, 2}] * 3 + [{3, 4}] * 3 + [{5, 1}] * 3 + [{2, 3}] * 3


def test_a_turn_goes_on_while_nobody_waits_and_ends_at_once_when_somebody_does():
    turns = Turns(slots=1, steps=3)
    for _ in range(10):
        assert turns.begin_step([1]) == []
    assert turns.begin_step([1, 2]) == []  # it had a place at once, and did not wait
    assert list(turns.since) == [2]
    assert list(turns.waiting) == [1]


def test_a_mask_without_requests_gives_its_place_away_at_once():
    turns = Turns(slots=1, steps=3)
    turns.begin_step([1, 2])
    assert turns.begin_step([2]) == [2]
    assert turns.begin_step([2, 1]) == []
    assert (list(turns.since), list(turns.waiting)) == ([2], [1])


def test_a_pinned_mask_needs_no_turn_and_leaves_the_others_one_place_less():
    turns = Turns(slots=2, steps=3)
    turns.begin_step([1, 2, 3])
    assert list(turns.since) == [1, 2]
    turns.begin_step([1, 2, 3], pinned={3})
    assert (list(turns.since), list(turns.waiting)) == ([2], [1])


@given(st.lists(st.sets(st.integers(1, 9)), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 5))
def test_no_mask_waits_longer_than_the_bound(traffic, slots, steps):
    turns, latest = Turns(slots, steps), {}
    for step, wanted in enumerate(traffic):
        before = set(turns.waiting)
        turns.begin_step(sorted(wanted))
        assert len(turns.since) <= slots
        assert turns.since.keys() | turns.waiting.keys() == wanted
        assert not turns.waiting or len(turns.since) == slots
        places = {mask: at for at, mask in enumerate(turns.waiting, 1)}
        for mask in places.keys() - before:
            latest[mask] = step + ceil(places[mask] / slots) * steps
        for mask in places:
            assert step < latest[mask]


# vLLM's scheduler, driven without a model: every token is a 7.


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    args = EngineArgs(
        model=str(BASE),
        dtype="float32",
        enable_lora=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        additional_config={"turn_steps": TURN},
    )
    return args.create_engine_config()


class Driver:
    """A scheduler and the steps it made; requests are named mask/number."""

    def __init__(self, cls, config, slots, blocks=1000, seqs=16, budget=512, ahead=0):
        config = copy.deepcopy(config)
        config.lora_config.max_loras = slots
        config.scheduler_config.max_num_seqs = seqs
        config.scheduler_config.max_num_batched_tokens = budget
        config.cache_config.num_gpu_blocks = blocks
        config.cache_config.block_size = BLOCK
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        kv = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = cls(config, kv, StructuredOutputManager(config), BLOCK)
        self.slots, self.ahead = slots, ahead
        self.numbers = count()
        self.steps: list[dict[str, int]] = []  # tokens scheduled of each request
        self.first: dict[str, int] = {}  # step of each request's first token
        self.finished: dict[str, int] = {}
        self.pending = deque()

    def ask(self, mask: int, prompt: int = 20, tokens: int = 5) -> str:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        lora = LoRARequest(f"m{mask}", mask, "unused") if mask else None
        name = f"{mask}/{next(self.numbers)}"
        self.scheduler.add_request(Request(name, [7] * prompt, sampling, None, lora_request=lora))
        return name

    def step(self) -> dict[str, int]:
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        assert len({n.split("/")[0] for n in names} - {"0"}) <= self.slots
        sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [7] for name in names]
        self.steps.append(dict(output.num_scheduled_tokens))
        indices = {name: at for at, name in enumerate(names)}
        self.pending.append((output, ModelRunnerOutput(names, indices, sampled)))
        while len(self.pending) > self.ahead:
            for made in self.scheduler.update_from_output(*self.pending.popleft()).values():
                for one in made.outputs:
                    self.first.setdefault(one.request_id, len(self.steps) - 1)
                    if one.finish_reason is not None:
                        self.finished[one.request_id] = len(self.steps) - 1
        return self.steps[-1]

    def outstanding(self, mask: int) -> int:
        return sum(mask_of(request) == mask for request in self.scheduler.requests.values())

    def masks(self, step: int) -> set[int]:
        return {int(name.split("/")[0]) for name in self.steps[step]}


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(("cls", "ahead"), [(MaskScheduler, 0), (AsyncMaskScheduler, 1)])
def test_beside_a_hot_mask_fifteen_cold_ones_get_their_first_token_within_the_bound(
    config, cls, ahead, slots
):
    """The hot mask has forty requests at all times, where sixteen can run, and all came before the others."""
    driver = Driver(cls, config, slots, ahead=ahead)

    def step_beside_hot():
        for _ in range(40 - driver.outstanding(1)):
            driver.ask(1, tokens=60)
        driver.step()

    for _ in range(20):
        step_beside_hot()
    cold = [driver.ask(mask) for mask in range(2, 17)]
    asked, bound = len(driver.steps), ceil(15 / slots) * TURN
    for _ in range(bound + 1 + ahead):
        step_beside_hot()
    assert all(name in driver.first for name in cold)
    assert max(driver.first[name] for name in cold) <= asked + bound + ahead
    # No step was empty, but for those ahead of a mask's last token, which is not known yet.
    assert all(map(any, zip(*(driver.steps[at:] for at in range(ahead + 1)), strict=False)))
    for _ in range(3 * bound):
        step_beside_hot()
    assert all(name in driver.finished for name in cold)
    assert driver.masks(-1) == {1}


@pytest.mark.parametrize("blocks", [1000, 40])
def test_while_there_are_slots_for_all_every_step_is_vllms_own(config, blocks):
    theirs, ours = (Driver(cls, config, 4, blocks) for cls in (Scheduler, MaskScheduler))
    dice = random.Random(0)
    for _ in range(400):
        if dice.random() < 0.3:
            asked = dice.randrange(5), dice.randrange(1, 200), dice.randrange(1, 60)
            theirs.ask(*asked)
            ours.ask(*asked)
        assert theirs.step() == ours.step()
    assert theirs.finished == ours.finished
    assert len(ours.finished) > 50


def test_a_half_read_prompt_stands_still_and_goes_on_where_it_was(config):
    driver = Driver(MaskScheduler, config, slots=1, budget=32)
    long = driver.ask(1, prompt=400)
    driver.step()
    short = driver.ask(2, tokens=20)
    for _ in range(60):
        driver.step()
    read = [step.get(long, 0) for step in driver.steps]
    assert read[: 2 * TURN] == [32] * TURN + [0] * TURN  # its turn, and the other's
    assert sum(read) == 400 + 5 - 1  # nothing was read twice
    assert {long, short} <= driver.finished.keys()


@pytest.mark.parametrize("slots", [1, 2])
def test_kv_blocks_that_those_who_stand_still_hold_are_taken_from_them(config, slots):
    """20 blocks of 16: one request of 150 + 100 needs 16 of them."""
    driver = Driver(MaskScheduler, config, slots, blocks=21)
    names = [driver.ask(mask, prompt=150, tokens=100) for mask in (1, 2, 3) for _ in range(2)]
    while len(driver.finished) < len(names):
        driver.step()
        assert driver.steps[-1] or driver.steps[-2]
        assert len(driver.steps) < 5000
    assert max(driver.first[name] for name in (names[2], names[4])) <= 2 * TURN


def test_a_turn_is_not_spent_without_kv_blocks_while_others_stand_still_on_them(config):
    """7 blocks of 16, of which each of the two needs 5 in the end."""
    driver = Driver(MaskScheduler, config, slots=1, blocks=8)
    names = [driver.ask(mask, prompt=16, tokens=60) for mask in (1, 2)]
    while len(driver.finished) < len(names):
        assert driver.step()


def test_a_mask_whose_requests_are_aborted_gives_its_place_away_in_the_next_step(config):
    driver = Driver(MaskScheduler, config, slots=1)
    hot = driver.ask(1, tokens=400)
    driver.step()
    driver.ask(2)
    driver.step()
    driver.scheduler.finish_requests(hot, RequestStatus.FINISHED_ABORTED)
    driver.step()
    assert [driver.masks(step) for step in range(3)] == [{1}, {1}, {2}]


def test_the_dense_base_and_pinned_masks_run_in_every_step(config):
    driver = Driver(MaskScheduler, config, slots=2)
    driver.scheduler.pinned.add(9)
    for mask in (0, 9, 1, 2, 3):
        driver.ask(mask, tokens=300)
    for _ in range(3 * TURN):
        driver.step()
    turns = [driver.masks(step) for step in range(3 * TURN)]
    assert turns == [{0, 9, 1}] * TURN + [{0, 9, 2}] * TURN + [{0, 9, 3}] * TURN


def test_the_slot_of_a_pinned_mask_is_nobodys_though_it_has_no_requests(config):
    driver = Driver(MaskScheduler, config, slots=2)
    driver.scheduler.pinned.add(9)
    for mask in (1, 2):
        driver.ask(mask, tokens=300)
    for _ in range(2 * TURN):
        driver.step()
    assert [driver.masks(step) for step in range(2 * TURN)] == [{1}] * TURN + [{2}] * TURN


def test_priorities_decide_among_the_masks_whose_turn_it_is(config):
    config = copy.deepcopy(config)
    config.scheduler_config.policy = "priority"
    driver = Driver(MaskScheduler, config, slots=1, blocks=21)
    for mask in (1, 2, 3):
        driver.ask(mask, prompt=150, tokens=100)
    while len(driver.finished) < 3:
        driver.step()
        assert len(driver.steps) < 5000
