"""Generations round trip, and hostile payloads: BadRequestError or a valid generation, never anything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmq.protocol import limits
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.payload import (
    MAX_SEED,
    Generation,
    Prior,
    Sampling,
    check_generation,
    pack_generation,
    resumed,
    unpack_generation,
)

hostile = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
tokens = st.integers(0, limits.MAX_TOKEN_ID)
samplings = st.builds(
    Sampling,
    st.integers(1, limits.MAX_NEW_TOKENS),
    st.floats(0, 100),
    st.integers(0, 2**31 - 1),
    st.floats(1e-9, 1),
    st.integers(0, MAX_SEED),
    st.lists(names, max_size=4).map(tuple),
    st.lists(tokens, max_size=4).map(tuple),
    st.booleans(),
)
chat_messages = st.fixed_dictionaries(
    {"role": names, "content": texts}, optional={"name": texts, "more": st.lists(tokens | texts, max_size=2)}
)
generations = st.one_of(
    st.builds(Generation, prompt=names, sampling=samplings),
    st.builds(Generation, token_ids=st.lists(tokens, min_size=1, max_size=9).map(tuple), sampling=samplings),
    st.builds(Generation, messages=st.lists(chat_messages, min_size=1, max_size=3).map(tuple), sampling=samplings),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | st.builds(object)
    | st.integers(2**64, 2**70)
)
wild = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=9) | st.integers() | st.sampled_from(["role", "content"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


def generation_or_refusal(make: Callable[[Any], Generation], value: Any) -> None:
    try:
        generation = make(value)
    except BadRequestError as error:
        refusal = error.message
    else:
        assert unpack_generation(pack_generation(generation)) == generation
        return
    assert refusal.startswith("request")
    assert len(refusal) < 400


@given(generations)
@settings(max_examples=200, deadline=None)
def test_round_trip(generation: Generation) -> None:
    payload = pack_generation(generation)
    assert unpack_generation(payload) == generation
    assert pack_generation(unpack_generation(payload)) == payload


@given(generations, st.lists(tokens, min_size=1, max_size=9).map(tuple), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_resumed_payload_differs_in_its_prior_only(
    generation: Generation, token_ids: tuple[int, ...], chars: int
) -> None:
    prior = Prior(token_ids, chars)
    most = generation.sampling.max_tokens
    if len(token_ids) > most:
        with pytest.raises(BadRequestError, match="max_tokens"):
            unpack_generation(resumed(pack_generation(generation), prior))
        return
    again = unpack_generation(resumed(pack_generation(generation), prior))
    assert again == replace(generation, prior=prior)
    # A second fault: the newer prior replaces the older one.
    longer = Prior((*token_ids, 5)[:most], chars + 1)
    assert unpack_generation(resumed(pack_generation(again), longer)) == replace(generation, prior=longer)


@given(st.binary(max_size=80))
@hostile
def test_random_bytes(payload: bytes) -> None:
    generation_or_refusal(unpack_generation, payload)


@given(generations.map(pack_generation), st.data())
@hostile
def test_mutated_payloads(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    end = data.draw(st.integers(at, min(len(payload), at + 4)))
    generation_or_refusal(unpack_generation, payload[:at] + data.draw(st.binary(max_size=6)) + payload[end:])


@given(generations, wild, st.data())
@hostile
def test_one_field_replaced_by_anything(generation: Generation, value: Any, data: st.DataObject) -> None:
    body = msgpack.unpackb(pack_generation(generation))
    inside = body["sampling"] if data.draw(st.booleans()) else body
    inside[data.draw(st.sampled_from(sorted(inside)))] = value
    generation_or_refusal(check_generation, body)
    try:
        payload = msgpack.packb(body)
    except (TypeError, ValueError, OverflowError):
        return
    generation_or_refusal(unpack_generation, payload)


@given(wild)
@hostile
def test_random_values_of_a_user(value: Any) -> None:
    generation_or_refusal(check_generation, value)
