"""Write tests/vectors/: one file a command with messages and their frames, and files of what must be refused.

The files are the contract of TMQ/1, also for implementations in other languages; a test holds the code to them. Run
this only to add vectors: a changed line of an existing one is a changed protocol.

    .venv/bin/python scripts/make_vectors.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import msgpack

from tokenmq.protocol import limits
from tokenmq.protocol.codec import encode, header
from tokenmq.protocol.messages import (
    Accepted,
    Attach,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Considered,
    Credit,
    Decision,
    Details,
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Parked,
    Query,
    Ready,
    Reply,
    Request,
    Started,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
    Welcome,
    WorkerState,
)
from tokenmq.protocol.payload import MAX_SEED, Generation, Prior, Sampling, pack_generation

VECTORS = Path(__file__).parent.parent / "tests" / "vectors"
ID = bytes(range(16))
OTHER_ID = bytes(range(0xF0, 0x100))
ROUTE = bytes.fromhex("a0a1a2a3a4a5a6a7a8a9aaabacadaeaf")

PROMPT = Generation(prompt="The sea is", sampling=Sampling(max_tokens=64, temperature=0.0, seed=7))
GENERATIONS: dict[str, Generation] = {
    "prompt": PROMPT,
    "token ids": Generation(token_ids=(1, 2, limits.MAX_TOKEN_ID)),
    "chat, every sampling field": Generation(
        messages=(
            {"role": "system", "content": "Answer in one line."},
            {"role": "user", "content": "Wie heißt 海? 🌊", "name": "ana"},
        ),
        sampling=Sampling(limits.MAX_NEW_TOKENS, 0.5, 40, 0.9, MAX_SEED, ("\n\n", "</s>"), (0, 2), ignore_eos=True),
    ),
    "to be continued": Generation(prompt="The sea is", sampling=PROMPT.sampling, prior=Prior((345, 11, 6), 9)),
    "every restriction": Generation(
        prompt="x",
        sampling=Sampling(
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            logit_bias=((13, -100.0), (limits.MAX_TOKEN_ID, 2.5)),
            bad_words=("海",),
            min_tokens=4,
            logprobs=limits.MAX_LOGPROBS,
            regex="[a-z]+",
        ),
        echo=True,
    ),
    "images and tools": Generation(
        messages=(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {}}]},
        ),
        sampling=Sampling(json_schema='{"type": "object"}', logprobs=0),
        tools=({"name": "look", "parameters": {"type": "object"}},),
        template={"enable_thinking": False},
    ),
    "one of some": Generation(prompt="Yes or no?", sampling=Sampling(choice=("yes", "no"))),
    "embeddings": Generation(texts=("The sea is", "海")),
}

FULL_LOAD = Load(
    WorkerState.STALLED, 7, 3, 10, 123_456, 31.5, 412.25, 0.75, 12.5, 0.25, 0.5, 0.875, 3_000_000_000, 24_000_000_000
)
DETAILED = Details(
    logprobs=(
        TokenLogprobs(345, " blue", -0.25, (TokenLogprob(345, " blue", -0.25), TokenLogprob(9, " red", -2.0))),
    ),
    prompt_logprobs=(None, TokenLogprobs(22, " sea", -1.5)),
)
DECISION = Decision(
    "front", "shortest-queue", "west", 2, (Considered("west", 3, 32, 41.5, 0.125), Considered("gpu-0", 9, 16))
)
MESSAGES: dict[str, Message] = {
    "hello": Hello("notebook", "tokenmq 0.1.0", 2.0),
    "hello without a wish": Hello("", ""),
    "hello of one that takes chunks itself": Hello("notebook", "", None, True),
    "hello unicode": Hello("büro-海-🌊", "x" * 40),
    "welcome": Welcome("broker-1", "tokenmq 0.1.0", 1.0, 5.0),
    "welcome of one among equals": Welcome("broker-1.2", "tokenmq 0.1.0", 1.0, 5.0, "5f1c9a0e5f1c9a0e"),
    "ready": Ready(
        "gpu-0",
        1_700_000_000,
        "tokenmq 0.1.0",
        (ModelInfo("smollm2", 8192, True, True),),
        16,
        "transformers",
        Load(),
    ),
    "ready while loading": Ready(
        "gpu-0", 1, "", (ModelInfo("smollm2"),), 1, "", Load(state=WorkerState.LOADING), 0.5, 10.0
    ),
    "ready with the largest values": Ready(
        "n" * limits.MAX_NAME_CHARS,
        limits.MAX_COUNT,
        "s",
        (ModelInfo("a", limits.MAX_COUNT, True, True), ModelInfo("모델", 0, False)),
        limits.MAX_SLOTS,
        "synthetic",
        FULL_LOAD,
        1e6,
        limits.MAX_SECONDS,
    ),
    "ready of a broker": Ready(
        "west", 1, "tokenmq 0.1.0", (), 32, "broker", Load(), brokers=("5f1c9a0e5f1c9a0e", "0badcafe0badcafe")
    ),
    "ready of a worker that clients can reach": Ready(
        "gpu-0", 1, "", (ModelInfo("smollm2"),), 1, "", Load(), direct="tcp://10.0.0.5:5600"
    ),
    "accepted": Accepted("broker-1", "tokenmq 0.1.0", 1.0, 5.0),
    "request from a client": Request(ID, Envelope("smollm2", 1, 256, 30.0), pack_generation(PROMPT)),
    "request to a worker": Request(ID, Envelope("smollm2", 1, 256, 29.5, ROUTE), pack_generation(PROMPT)),
    "request whose chunks are taken": Request(ID, Envelope("smollm2", 1, 256, None, ROUTE, key=OTHER_ID), b"\x80"),
    "request that resumes": Request(
        ID,
        Envelope("smollm2", 2, 512, 12.5, prior_tokens=3, avoid=("gpu-0",), queue_s=10.0),
        pack_generation(GENERATIONS["to be continued"]),
    ),
    "request with all that routing may know": Request(
        ID,
        Envelope(
            "smollm2",
            2,
            256,
            None,
            ROUTE,
            0,
            ("west/gpu-3",),
            None,
            64,
            9,
            "b5d4045c3f466fa9",
            True,
            True,
            ("5f1c9a0e5f1c9a0e",),
        ),
        pack_generation(PROMPT),
    ),
    "request without a deadline, with attachments": Request(
        OTHER_ID, Envelope("llava", 2, 0), b"\x80", (b"\x89PNG\r\n", b"", b"\xff\xd8\xff")
    ),
    "request with an empty payload": Request(
        ID, Envelope("海", limits.MAX_COUNT, limits.MAX_CREDIT_TOKENS, 0.0), b""
    ),
    "credit": Credit(ID, 1, 512),
    "credit, largest": Credit(OTHER_ID, limits.MAX_COUNT, limits.MAX_CREDIT_TOKENS),
    "cancel": Cancel(ID, 1),
    "parked": Parked(ID, 1),
    "started": Started(ID, 1, "gpu-0"),
    "started, for one that takes chunks itself": Started(ID, 1, "gpu-0", "tcp://10.0.0.5:5600", OTHER_ID),
    "started, by a worker with CURVE": Started(
        ID, 1, "gpu-0", "tcp://10.0.0.5:5600", OTHER_ID, "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    ),
    "attach": Attach(OTHER_ID),
    "chunks": Chunks(ROUTE, (Chunk(ID, 1, 0, 12, (345,), " blue"),)),
    "chunks of two streams": Chunks(
        ROUTE, (Chunk(ID, 1, 0, 0, (1, 22, 333), "Das Meer"), Chunk(OTHER_ID, 3, 1, 99, (4444,), " 海🌊"))
    ),
    "chunks with logprobs": Chunks(ROUTE, (Chunk(ID, 1, 0, 0, (345,), "The sea blue", DETAILED),)),
    "chunks with a vector": Chunks(ROUTE, (Chunk(ID, 1, 7, 0, (), "", Details(vector=bytes(8))),)),
    "chunks, text without tokens": Chunks(ROUTE, (Chunk(ID, 1, 0, 64, (), " held back"),)),
    "chunks, tokens without text": Chunks(ROUTE, (Chunk(ID, 1, 0, 64, (0, limits.MAX_TOKEN_ID), ""),)),
    "chunks, largest": Chunks(
        bytes(16), (Chunk(b"\xff" * 16, limits.MAX_COUNT, limits.MAX_COMPLETIONS - 1, limits.MAX_COUNT, (9,), "\0"),)
    ),
    "finish": Finish(ID, 1, FinishReason.STOP, Usage(4, 64), Timings(0.0, 0.25, 0.125, 1.5), "gpu-0"),
    "finish beside its chunks": Finish(ID, 1, FinishReason.STOP, Usage(4, 64), Timings(), "gpu-0", 17),
    "finish with a decision": Finish(
        ID, 1, FinishReason.STOP, Usage(4, 64), Timings(0.5, 0.25, 0.125, 1.5, (DECISION,)), "west/gpu-3"
    ),
    "finish at the length": Finish(ID, 2, FinishReason.LENGTH, Usage(4, 256), Timings(), ""),
    "finish, cancelled": Finish(OTHER_ID, 1, FinishReason.CANCELLED, Usage(), Timings(), "gpu-0"),
    "error": Error(ID, 1, "busy", "smollm2: 128 requests wait already", True, 0.5),
    "error without retry": Error(ID, 0, "bad_request", "unknown method 'modles'; known are models, status, workers"),
    "error of a newer peer": Error(ID, 1, "too_hot", "das Gerät ist überhitzt 🔥", True),
    "error of a worker that was lost": Error(
        ID, 1, "worker_lost", "worker gpu-0 was lost: its connection is gone", True, None, "gpu-0"
    ),
    "query": Query(ID, "models"),
    "query with arguments": Query(
        ID, "workers", {"model": "smollm2", "deep": [1, -1, 0.5, None, True, {"a": b"\0"}]}
    ),
    "reply": Reply(ID, [{"name": "smollm2", "workers": 1, "ready": 1, "slots": 16}]),
    "reply with nothing": Reply(ID, None),
    "reply with extremes": Reply(
        OTHER_ID, {"least": limits.MIN_INTEGER, "most": limits.MAX_INTEGER, "": "", "list": []}
    ),
    "heartbeat": Heartbeat(17),
    "heartbeat of a worker": Heartbeat(17, Load(WorkerState.READY, 2, 0, 2, 4096, 0.25, 64.5, 0.125)),
    "heartbeat of a stalled worker": Heartbeat(limits.MAX_COUNT, FULL_LOAD),
    "draining": Draining(),
    "goodbye": Goodbye(),
    "disconnect": Disconnect(DisconnectCode.UNKNOWN_PEER, "no session with this peer; say HELLO or READY first"),
    "drain": Drain(30.0),
    "drain, the worker's own grace": Drain(),
    "drain, taken back": Drain(undo=True),
    **{f"disconnect, {code.value}": Disconnect(code, "") for code in DisconnectCode},
}


def plain_of(value: Any) -> Any:
    """Turn a message into JSON data: byte strings as {"hex": ...}, records as maps with every field."""
    if dataclasses.is_dataclass(value):
        return {item.name: plain_of(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, (list, tuple)):
        return [plain_of(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain_of(item) for key, item in value.items()}
    return value


def _frames(command: Command, body: Any, *more: bytes, subject: bytes = ID) -> list[bytes]:
    return [header(command, subject) + (body if isinstance(body, bytes) else msgpack.packb(body)), *more]


def _chunk(**changed: Any) -> list[bytes]:
    fields = {"request_id": ID, "attempt": 1, "index": 0, "offset": 0, "token_ids": [1], "text": "a", **changed}
    return _frames(Command.CHUNKS, [list(fields.values())], subject=ROUTE)


_BEAT = header(Command.HEARTBEAT)
_GOOD_ENVELOPE: dict[str, Any] = {"model": "m", "attempt": 1, "credit": 1}
#: What a receiver must take although this implementation sends it otherwise: (frames, what it means).
LENIENT: dict[str, tuple[list[bytes], Message]] = {
    "unknown keys are ignored": (_frames(Command.CREDIT, {"limit": 5, "new": [1], "attempt": 1}), Credit(ID, 1, 5)),
    "an empty body may have keys": (_frames(Command.GOODBYE, {"why": "x"}, subject=bytes(16)), Goodbye()),
    "integers need not be short": (
        _frames(Command.CANCEL, b"\x81\xa7attempt\xcf\0\0\0\0\0\0\0\x01"),
        Cancel(ID, 1),
    ),
    "an integer where a number is wanted": (
        _frames(Command.HELLO, {"client": "", "software": "", "heartbeat_s": 2}, subject=bytes(16)),
        Hello("", "", 2.0),
    ),
    "nil where an optional field may be absent": (
        _frames(Command.HEARTBEAT, {"sent": 1, "load": None}, subject=bytes(16)),
        Heartbeat(1),
    ),
    "records may leave out fields with defaults": (
        _frames(Command.HEARTBEAT, {"sent": 1, "load": {}}, subject=bytes(16)),
        Heartbeat(1, Load()),
    ),
    "chunks may grow": (
        _frames(Command.CHUNKS, [[ID, 1, 0, 0, [1], "a", {"logprobs": []}, 8]], subject=ROUTE),
        Chunks(ROUTE, (Chunk(ID, 1, 0, 0, (1,), "a"),)),
    ),
}
#: What a receiver must refuse, and a part of what this implementation says.
BAD: dict[str, tuple[list[bytes], str]] = {
    "no frames": ([], "empty message"),
    "empty header": ([b"", b"\x80"], "header: expected 24 bytes, got 0"),
    "short header": ([_BEAT[:-1], b"\x80"], "header: expected 24 bytes, got 23"),
    "a body of its own": ([_BEAT, b"\x81\xa4sent\x01"], "HEARTBEAT: expected one frame, got 2"),
    "other magic": ([b"TMX" + _BEAT[3:] + b"\x80"], "header: does not begin with TMQ"),
    "other version": ([b"TMQ\x02" + _BEAT[4:] + b"\x80"], "header: protocol version 2"),
    "unknown command": ([_BEAT[:4] + b"\x7f" + _BEAT[5:] + b"\x80"], "header: unknown command 0x7f"),
    "reserved bytes": ([_BEAT[:7] + b"\x01" + _BEAT[8:] + b"\x80"], "header: reserved bytes"),
    "no body": ([_BEAT], "HEARTBEAT: not valid msgpack"),
    "two bodies": ([_BEAT + b"\x80", b"\x80"], "HEARTBEAT: expected one frame, got 2"),
    "truncated body": ([_BEAT + b"\x81\xa4sent"], "HEARTBEAT: not valid msgpack"),
    "bytes after the body": ([_BEAT + b"\x81\xa4sent\x01\xc0"], "HEARTBEAT: not valid msgpack: bytes after its end"),
    "unused byte": ([_BEAT + b"\xc1"], "HEARTBEAT: not valid msgpack"),
    "a list for a body": ([_BEAT + b"\x91\x01"], "HEARTBEAT: expected a map, got a list of 1"),
    "missing field": ([_BEAT + b"\x80"], "HEARTBEAT: missing sent"),
    "key twice": ([_BEAT + b"\x82\xa4sent\x01\xa4sent\x02"], "a map has a key twice"),
    "bytes for a key": ([_BEAT + b"\x82\xa4sent\x01\xc4\x01a\x02"], "a map has a key that is not a string"),
    "integer for a key": ([_BEAT + b"\x82\xa4sent\x01\x01\x02"], "a map has a key that is not a string"),
    "not UTF-8": ([_BEAT + b"\x81\xa4sen\xff\x01"], "HEARTBEAT: not valid msgpack"),
    "lone surrogate": ([_BEAT + b"\x82\xa4sent\x01\xa1a\xa3\xed\xa0\x80"], "HEARTBEAT: not valid msgpack"),
    "extension": ([_BEAT + b"\x82\xa4sent\x01\xa1a\xd4\x05\x00"], "HEARTBEAT: not valid msgpack"),
    "empty extension": ([_BEAT + b"\x82\xa4sent\x01\xa1a\xc7\x00\x05"], "extension type 5 is not allowed"),
    "timestamp": ([_BEAT + b"\x82\xa4sent\x01\xa1a\xd6\xff\0\0\0\0"], "HEARTBEAT: not valid msgpack"),
    "nested too deeply": ([_BEAT + b"\x91" * 5000 + b"\xc0"], "HEARTBEAT: nested too deeply"),
    "huge declared array": ([_BEAT + b"\xdd\xff\xff\xff\xff"], "HEARTBEAT: not valid msgpack"),
    "huge declared map": ([_BEAT + b"\xdf\xff\xff\xff\xff"], "HEARTBEAT: not valid msgpack"),
    "huge declared string": ([_BEAT + b"\xdb\xff\xff\xff\xff"], "HEARTBEAT: not valid msgpack"),
    "boolean for an integer": ([_BEAT + b"\x81\xa4sent\xc3"], "HEARTBEAT.sent: expected an integer from 0"),
    "float for an integer": ([_BEAT + msgpack.packb({"sent": 1.0})], "HEARTBEAT.sent: expected an integer"),
    "negative count": ([_BEAT + b"\x81\xa4sent\xff"], "HEARTBEAT.sent: expected an integer from 0"),
    "count over 63 bits": ([_BEAT + msgpack.packb({"sent": 2**63})], "HEARTBEAT.sent: expected an integer from 0"),
    "half a public key": (
        _frames(Command.STARTED, {"attempt": 1, "worker": "w", "server_key": "x" * 20}, subject=ID),
        "STARTED.server_key: expected 40 characters of Z85, or none",
    ),
    "unknown state": ([_BEAT + msgpack.packb({"sent": 1, "load": {"state": "asleep"}})], "HEARTBEAT.load.state"),
    "NaN": ([_BEAT + msgpack.packb({"sent": 1, "load": {"kv_use": float("nan")}})], "HEARTBEAT.load.kv_use"),
    "infinity": (
        [_BEAT + msgpack.packb({"sent": 1, "load": {"tokens_per_s": float("inf")}})],
        "HEARTBEAT.load.tokens_per_s: expected a number",
    ),
    "negative duration": ([_BEAT + msgpack.packb({"sent": 1, "load": {"step_age_s": -1}})], "step_age_s"),
    "empty name": (
        _frames(Command.QUERY, {"method": "", "arguments": {}}),
        "QUERY.method: expected a string of 1 to 256 characters, got ''",
    ),
    "long name": (_frames(Command.QUERY, {"method": "m" * 257}), "QUERY.method: expected a string of 1 to 256"),
    "arguments are a map": (_frames(Command.QUERY, {"method": "m", "arguments": []}), "QUERY.arguments"),
    "arguments nest 32 levels": (
        _frames(Command.QUERY, b"\x82\xa6method\xa1m\xa9arguments\x81\xa1a" + b"\x91" * 32 + b"\xc0"),
        "QUERY.arguments: nested deeper than 32 levels",
    ),
    "infinity in a reply": (_frames(Command.REPLY, {"result": [float("-inf")]}), "REPLY.result"),
    "request without a payload": (_frames(Command.REQUEST, _GOOD_ENVELOPE), "REQUEST: expected a payload"),
    "request without a model": (
        _frames(Command.REQUEST, {"attempt": 1, "credit": 1}, b""),
        "envelope: missing model",
    ),
    "attempt 0": (_frames(Command.REQUEST, {**_GOOD_ENVELOPE, "attempt": 0}, b""), "envelope.attempt"),
    "credit without measure": (
        _frames(Command.CREDIT, {"attempt": 1, "limit": 2**21 + 1}),
        "CREDIT.limit: expected an integer from 0 to 2097152",
    ),
    "too many workers to avoid": (
        _frames(Command.REQUEST, {**_GOOD_ENVELOPE, "avoid": ["w"] * 17}, b""),
        "envelope.avoid: expected a list of 0 to 16 elements",
    ),
    "priority beyond the last": (
        _frames(Command.REQUEST, {**_GOOD_ENVELOPE, "priority": 10}, b""),
        "envelope.priority: expected an integer from 0 to 9, got 10",
    ),
    "too many brokers passed": (
        _frames(Command.REQUEST, {**_GOOD_ENVELOPE, "path": ["b"] * 9}, b""),
        "envelope.path: expected a list of 0 to 8 elements",
    ),
    "short route": (
        _frames(Command.REQUEST, {**_GOOD_ENVELOPE, "route": b"abc"}, b""),
        "envelope.route: expected 16",
    ),
    "too many attachments": (
        _frames(Command.REQUEST, _GOOD_ENVELOPE, b"", *[b""] * 65),
        "REQUEST: 65 attachments, at most 64",
    ),
    "no chunks": (_frames(Command.CHUNKS, [], subject=ROUTE), "chunks: expected a list of 1 to"),
    "chunks are a list": (_frames(Command.CHUNKS, {}, subject=ROUTE), "chunks: expected a list"),
    "short chunk": (_frames(Command.CHUNKS, [[ID, 1, 0, 0, []]], subject=ROUTE), "chunks[0]: expected a list of 6"),
    "details are a map": (
        _frames(Command.CHUNKS, [[ID, 1, 0, 0, [1], "a", []]], subject=ROUTE),
        "chunks[0].details: expected a map",
    ),
    "a vector of odd length": (
        _frames(Command.CHUNKS, [[ID, 1, 0, 0, [], "", {"vector": bytes(5)}]], subject=ROUTE),
        "chunks[0].details.vector: expected at most 262144 bytes, a multiple of 4",
    ),
    "a probability above 1": (
        _frames(Command.CHUNKS, [[ID, 1, 0, 0, [1], "", {"logprobs": [[1, "a", 0.5, []]]}]], subject=ROUTE),
        "chunks[0].details.logprobs[0].logprob: expected a number",
    ),
    "a logprob without alternatives": (
        _frames(Command.CHUNKS, [[ID, 1, 0, 0, [1], "", {"logprobs": [[1, "a", -0.5]]}]], subject=ROUTE),
        "chunks[0].details.logprobs[0]: expected a list of 4 elements",
    ),
    "chunk id": (_chunk(request_id=ID[:15]), "chunks[0].request_id: expected 16 bytes, got 15 bytes"),
    "chunk id is text": (_chunk(request_id="a" * 16), "chunks[0].request_id"),
    "chunk attempt": (_chunk(attempt=0), "chunks[0].attempt"),
    "chunk index": (_chunk(index=1024), "chunks[0].index: expected an integer from 0 to 1023, got 1024"),
    "chunk offset": (_chunk(offset=-1), "chunks[0].offset"),
    "chunk offset over 63 bits": (_chunk(offset=2**63), "chunks[0].offset"),
    "chunk tokens": (_chunk(token_ids=[1, True]), "chunks[0].token_ids[1]"),
    "chunk token too large": (_chunk(token_ids=[2**31]), "chunks[0].token_ids[0]: expected an integer from 0 to"),
    "chunk text": (_chunk(text=b"a"), "chunks[0].text"),
}
BAD_PAYLOADS: dict[str, tuple[bytes, str]] = {
    "not msgpack": (b"\xc1", "request: not valid msgpack"),
    "not a map": (b"\x90", "request: expected a map, got a list of 0"),
    "nothing to do": (b"\x80", "request: give exactly one of prompt, token_ids, messages and texts; got none"),
    "two prompts": (msgpack.packb({"prompt": "a", "token_ids": [1]}), "got prompt and token_ids"),
    "unknown key": (
        msgpack.packb({"promt": "a"}),
        "request: unknown 'promt'; known are echo, messages, prior, prompt",
    ),
    "a prior of embeddings": (
        msgpack.packb({"texts": ["a"], "prior": {"token_ids": [1]}}),
        "request.prior: embeddings have no tokens to go on behind",
    ),
    "tools without a chat": (
        msgpack.packb({"prompt": "a", "tools": [{}]}),
        "request: tools and template are for a chat",
    ),
    "two grammars": (
        msgpack.packb({"prompt": "a", "sampling": {"regex": "a", "choice": ["b"]}}),
        "request.sampling: give one of json_schema, regex and choice; got regex and choice",
    ),
    "more at least than at most": (
        msgpack.packb({"prompt": "a", "sampling": {"min_tokens": 3, "max_tokens": 2}}),
        "request.sampling.min_tokens: 3, max_tokens is 2",
    ),
    "an unknown part": (
        msgpack.packb({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "request.messages[0].content[0].type: expected text or image, got 'image_url'",
    ),
    "no content": (
        msgpack.packb({"messages": [{"role": "assistant", "content": None}]}),
        "request.messages[0].content: expected a string",
    ),
    "a bias is a pair": (
        msgpack.packb({"prompt": "a", "sampling": {"logit_bias": [[1]]}}),
        "request.sampling.logit_bias[0]: expected a token id and a number",
    ),
    "unknown sampling key": (
        msgpack.packb({"prompt": "a", "sampling": {"beams": 2}}),
        "request.sampling: unknown 'beams'; known are ",
    ),
    "no tokens": (
        msgpack.packb({"prompt": "a", "sampling": {"max_tokens": 0}}),
        "request.sampling.max_tokens: expected an integer from 1 to 1048576, got 0",
    ),
    "prior without tokens": (
        msgpack.packb({"prompt": "a", "prior": {"token_ids": []}}),
        "request.prior.token_ids: expected",
    ),
    "prior longer than the completion": (
        msgpack.packb({"prompt": "a", "prior": {"token_ids": [1, 2]}, "sampling": {"max_tokens": 1}}),
        "request.prior: 2 tokens, max_tokens is 1",
    ),
    "message without content": (
        msgpack.packb({"messages": [{"role": "user"}]}),
        "request.messages[0]: missing content",
    ),
}


def vectors() -> dict[str, list[dict[str, Any]]]:
    """Return the contents of every file, by its name."""
    files: dict[str, list[dict[str, Any]]] = {}
    for name, message in MESSAGES.items():
        entry = {"name": name, "message": plain_of(message), "frames": [frame.hex() for frame in encode(message)]}
        files.setdefault(message.command.name.lower(), []).append(entry)
    files["lenient"] = [
        {
            "name": name,
            "command": message.command.name,
            "message": plain_of(message),
            "frames": [frame.hex() for frame in frames],
        }
        for name, (frames, message) in LENIENT.items()
    ]
    files["bad"] = [
        {"name": name, "frames": [frame.hex() for frame in frames], "error": error}
        for name, (frames, error) in BAD.items()
    ]
    files["payload"] = [
        {"name": name, "generation": plain_of(generation), "payload": pack_generation(generation).hex()}
        for name, generation in GENERATIONS.items()
    ]
    files["bad_payload"] = [
        {"name": name, "payload": payload.hex(), "error": error} for name, (payload, error) in BAD_PAYLOADS.items()
    ]
    return files


if __name__ == "__main__":
    for file, entries in vectors().items():
        text = json.dumps(entries, indent=1, ensure_ascii=False)
        (VECTORS / f"{file}.json").write_text(text + "\n", encoding="utf-8")
