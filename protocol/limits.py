"""Every limit of the wire, in one place, each with its reason.

A peer that exceeds one is answered with ERROR bad_request where a request can be named, else with DISCONNECT.
"""

#: One frame, as set on every socket (ZMQ_MAXMSGSIZE): libzmq cuts a peer off before it allocates more.
MAX_FRAME_BYTES = 32 * 1024 * 1024
#: Payload and attachments of one request: a prompt with a few large images.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
#: A body other than a request's payload: the longest is a chunk list or a management answer.
MAX_BODY_BYTES = 8 * 1024 * 1024
#: The first frame of what a client says: names, numbers, arguments of a question.
MAX_CLIENT_BYTES = 64 * 1024
#: The part of a REQUEST that only the worker reads: two million characters of prompt fit.
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
#: Raw frames (images) behind a REQUEST.
MAX_ATTACHMENTS = 64

#: Nesting of msgpack containers: tool schemas in chat messages are the deepest honest input.
MAX_DEPTH = 32
#: Elements of one msgpack array: the tokens of the longest prompt.
MAX_ARRAY_ITEMS = 1_048_576
#: Entries of one msgpack map.
MAX_MAP_ITEMS = 65_536
#: Arrays and maps in one body, all levels together: an empty one is a byte on the wire and over 60 in memory. The
#: largest honest body is a full CHUNKS, two arrays a chunk.
MAX_CONTAINERS = 262_144
#: Integers that msgpack can carry.
MIN_INTEGER = -(2**63)
MAX_INTEGER = 2**64 - 1

#: Names of models, workers, clients, policies, codes.
MAX_NAME_CHARS = 256
#: A message for a person.
MAX_TEXT_CHARS = 4_096
#: Models that one worker serves.
MAX_MODELS = 1_024
#: Requests that one worker may run at a time.
MAX_SLOTS = 65_536
#: Chunks in one CHUNKS message: the streams of one client in one engine step.
MAX_CHUNKS = 65_536
#: Largest counter that the wire carries: it fits a signed 64-bit integer everywhere.
MAX_COUNT = 2**63 - 1
#: Speeds of workers, tokens a second of one stream: brokers add them up and divide by them.
SLOWEST_TOKENS_PER_S = 1e-6
FASTEST_TOKENS_PER_S = 1e6
#: Largest duration in seconds (about 31 years): more is a mistake, and larger floats lose milliseconds.
MAX_SECONDS = 1e9

#: Tokens that one request may ask for.
MAX_NEW_TOKENS = 1_048_576
#: A credit limit that is no mistake: the longest completion, and as large a window behind it.
MAX_CREDIT_TOKENS = 2 * MAX_NEW_TOKENS
#: Workers that a request asks to be kept from: the last few that failed it.
MAX_AVOIDED = 16
#: Brokers that a request may pass on its way to a worker: three levels are a large company, and a loop ends soon.
MAX_HOPS = 8
#: Brokers below one that has an uplink, itself included.
MAX_BROKERS = 1_024
#: Priorities of requests: 0 is served last, this one first.
MAX_PRIORITY = 9
NORMAL_PRIORITY = 5
#: Workers that a dispatch decision lists.
MAX_CONSIDERED = 16
#: Completions of one request.
MAX_COMPLETIONS = 1_024
#: Token ids fit a signed 32-bit integer in every tokenizer.
MAX_TOKEN_ID = 2**31 - 1
#: Characters of one prompt or message content.
MAX_PROMPT_CHARS = 4_000_000
#: Token ids of one prompt.
MAX_PROMPT_TOKENS = MAX_ARRAY_ITEMS
#: Messages of one chat.
MAX_MESSAGES = 4_096
#: Parts of one message: texts and images.
MAX_PARTS = 1_024
#: Tools that a chat may name.
MAX_TOOLS = 1_024
#: Values in messages, tools and template arguments, all levels together: 16 MiB may hold 16 million of them, and the
#: worker's I/O loop looks at each (0.6 us), heartbeats waiting meanwhile. The most messages with the most tools of 48
#: values each fit.
MAX_CHAT_VALUES = 65_536
#: Texts of one request for embeddings. A client divides longer lists, so that several workers share them.
MAX_TEXTS = 256
#: Stop strings or stop ids of one request: each is looked for at every step.
MAX_STOPS = 64
#: Characters of one stop string: the detokeniser holds back as many.
MAX_STOP_CHARS = 1_024
#: Words that must not be generated, and characters of one: the engine tokenises all of them while others wait, and
#: looks for each at every step.
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
#: Tokens with a bias of their own: each is an index of every step's logits.
MAX_BIASES = 4_096
#: Alternatives that are told beside each token.
MAX_LOGPROBS = 32
#: The logarithm of a probability that a float32 no longer holds: what a token that cannot come is told with.
MIN_LOGPROB = -1e6
#: One embedding: 65,536 numbers of 4 bytes; known models have a few thousand.
MAX_VECTOR_BYTES = 262_144
#: Characters of a JSON schema or a regular expression: grammars take memory and time by their size.
MAX_GRAMMAR_CHARS = 65_536
#: Texts of which one must come out.
MAX_CHOICES = 4_096
