"""What the server accepts: sizes, numbers and times. Everything else is refused before compute."""

from __future__ import annotations

from dataclasses import dataclass

from glasslm.serve.api_error import ApiError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The limits of a server. Tests use smaller ones; the command has no flags for them."""

    head_bytes: int = 16 << 10  # request line and header fields
    body_bytes: int = 4 * MIB
    json_depth: int = 64
    prompts: int = 256  # in one request
    choices: int = 128  # n
    texts: int = 512  # prompts x n of one request
    prompt_tokens: int = 1 << 17  # of all prompts of a request, each n times
    max_tokens: int = 1 << 16
    stops: int = 16
    stop_chars: int = 1000
    biases: int = 1024  # entries of logit_bias
    schema_bytes: int = 64 << 10  # of a JSON schema
    queued_texts: int = 2048  # waiting or running, of all requests; more are refused with 429
    queued_tokens: int = 1 << 22  # of their prompts
    waiting_tokens: int = 8192  # generated for a client that does not read them; more: an error
    connections: int = 4096

    head_s: float = 10.0  # from the first byte of a request to the end of its header
    body_s: float = 20.0  # from there to the end of its body
    write_s: float = 10.0  # until a client takes the bytes that the system has no room for
    keep_alive_s: int = 30  # an idle connection
    ping_s: float = 5.0  # between comments of a stream while nothing is generated
    shutdown_s: int = 5  # from a signal to the exit


def large_head_error(limits: Limits) -> ApiError:
    """The error of a request whose header is too large."""
    return ApiError(
        431,
        f"the header is too large: expected at most {limits.head_bytes:,} bytes",
        code="too_large",
    )
