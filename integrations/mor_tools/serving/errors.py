"""Error responses in the format of the protocol."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class ServiceError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        parameter: the field of the body that caused the error.
        headers: additional headers of the response.
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
        """The JSON body in the format of the protocol."""
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
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)
