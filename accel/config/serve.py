"""Section `serve`: the address and the limits of the HTTP server."""

from dataclasses import dataclass, field

from accel.config.bounds import choice, number

PROCESS, RAY = "process", "ray"  # values of `executor`
# Keys that only replicas have
REPLICA_KEYS = (
    "replicas",
    "max_replicas",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
    "cpus_per_replica",
    "gpus_per_replica",
    "ray_address",
    "ray_dashboard",
)


@dataclass
class ServeConfig:
    """HTTP server of `stage=serve`.

    Attributes:
        models: Name -> folder of a deployable. Empty: serve the deployable of the run's own `model`, built first.
        host: Address to listen on. The default can be reached from this machine only.
        port: Port to listen on; 0: any free one, which the startup message names.
        api_key_variable: Environment variable with the key that clients must send as `Authorization: Bearer KEY`. Where
            it isn't set, no key is asked for.
        max_waiting: Requests of a model that wait for their turn; more are answered with 429.
        max_rows: Sequences of a model that are decoded at once.
        max_prompt_tokens: Tokens of a prompt; a longer one is answered with 413.
        max_new_tokens: New tokens that a request may ask for.
        max_total_tokens: Tokens that a sequence may have in the decoder: its new ones and, without an encoder, its
            prompt. A row of the running batch has caches for so many.
        stall_s: Seconds that running requests may wait between two tokens for the prompts of others, about. Parts of
            prompts are as long as the measured speed allows.
        window_s: Seconds that a request waits for others to be encoded or batched with.
        shared_prefixes: Prompt beginnings, shared by several prompts, whose caches are kept for later ones.
        default_new_tokens: New tokens of a request that doesn't say, unless the generation config does; fewer where
            `max_total_tokens` or the model's positions leave less.
        max_sequences: Sequences that one HTTP request may ask for: prompts x `n` x beams.
        timeout_s: Seconds that a request may take, its time in the queue included; then it is answered with 504.
        max_body_mb: Size of a body, in units of 10^6 bytes; a larger one is answered with 413.
        head_timeout_s: Seconds within which a client must send the head of a request, or be idle between two.
        body_timeout_s: Seconds within which a client must send the body.
        unread_timeout_s: Seconds that a client may leave a reply unread before its connection is cut.
        coalesce_s: Seconds for which new tokens of a stream are gathered into one event; its first and its last ones
            aren't held back. 0: an event for whatever there is.
        max_unread_tokens: Tokens that are kept for a client that doesn't read them; then its request is cancelled.
        drain_s: Seconds that requests in progress are given to end after SIGTERM or Ctrl-C.
        log_requests: Write a line of JSON for each request to standard error. It holds no text of prompts or outputs.
        model_process: Open the models in a process of its own, so that decoding doesn't wait for the Python
            interpreter while it answers HTTP. None: on a GPU. Not with replicas, which are such processes.
        executor: `process`: this process computes the replies. `ray`: replicas compute them, processes that Ray Serve
            starts, watches and shares the requests among. The fields below are for replicas.
        replicas: Replicas; with `max_replicas` the smallest number of them.
        max_replicas: Largest number of replicas; None: their number doesn't change.
        target_ongoing_requests: Requests in progress for each replica, which the number of replicas follows.
        upscale_delay_s: Seconds for which there must be too many requests before a replica is added.
        downscale_delay_s: Seconds for which there must be too few before one is ended.
        cpus_per_replica: CPUs that Ray reserves for a replica, and threads of its model on the CPU, unless
            `runtime.threads` says otherwise. None: 1 with a GPU or in a cluster; otherwise an equal share of this
            machine's.
        gpus_per_replica: GPUs that Ray reserves for a replica, which sees no others; less than 1 shares one. None: 1 if
            the models' runtime needs one, else 0.
        ray_address: Address of a Ray cluster to join, `HOST:PORT` or `auto`. None: start Ray on this machine, and end
            it with the server.
        ray_dashboard: Open Ray's dashboard on a free port of 127.0.0.1.
    """

    models: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = number(8000, 0, 65535)
    api_key_variable: str = "ACCEL_API_KEY"
    max_waiting: int = number(256)
    max_rows: int = number(32)
    max_prompt_tokens: int = number(4096)
    max_new_tokens: int = number(2048)
    max_total_tokens: int = number(4096, 2)
    stall_s: float = number(0.1, 0.001)
    window_s: float = number(0.005, 0)
    shared_prefixes: int = number(4, 0)
    default_new_tokens: int = number(256)
    max_sequences: int = number(16)
    timeout_s: float = number(300.0, 0.01)
    max_body_mb: float = number(25.0, 0.001, 10_000)
    head_timeout_s: float = number(10.0, 0.01)
    body_timeout_s: float = number(60.0, 0.01)
    unread_timeout_s: float = number(30.0, 0.01)
    coalesce_s: float = number(0.02, 0)
    max_unread_tokens: int = number(2048)
    drain_s: int = number(30, 0)
    log_requests: bool = True
    model_process: bool | None = None
    executor: str = choice(PROCESS, (PROCESS, RAY))
    replicas: int = number(1, 1, 10_000)
    max_replicas: int | None = number(None, 1, 10_000)
    target_ongoing_requests: float = number(16.0, 0.01)
    upscale_delay_s: float = number(30.0, 0)
    downscale_delay_s: float = number(600.0, 0)
    cpus_per_replica: int | None = number(None, 1, 10_000)
    gpus_per_replica: float | None = number(None, 0, 1000)
    ray_address: str | None = None
    ray_dashboard: bool = False
