"""Answers that are errors, in the protocol's shape."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class ServiceError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        parameter: field of the body that is to blame.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.parameter, self.headers = status, parameter, headers

    @property
    def body(self) -> dict[str, object]:
        """As the protocol wants it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.parameter,
                "code": self.status,
            }
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)
