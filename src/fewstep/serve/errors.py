"""Errors as the clients of OpenAI's API read them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from typing import Any

from fewstep.serve.engine import Full, Stopping
from fewstep.text import clean

__all__ = ["ApiError", "as_api_error"]

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LATER = 120  # seconds: the longest wait that the client of OpenAI obeys


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP
        message: one line
        param: the field that is at fault
        code: for programs
        retry_after: seconds, where another try makes sense
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, clean(message), param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client whether to try again."""
        if self.retry_after is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(min(LATER, max(1, math.ceil(self.retry_after))))}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the library."""
    match error:
        case ApiError():
            return error
        case Full():
            return ApiError(
                429,
                "the queue is full; try again later",
                code="queue_full",
                retry_after=error.seconds,
            )
        case Stopping():
            return ApiError(503, "the service is stopping", code="stopping", retry_after=5)
        case ValueError():
            return ApiError(400, str(error), code="invalid_value")
        case FloatingPointError():
            return ApiError(400, str(error), code="not_finite")
        case _:  # memory, the device: the next request may do better
            message = f"the pictures could not be made ({type(error).__name__})"
            return ApiError(503, message, code="failed", retry_after=10)
