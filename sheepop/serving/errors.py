"""What goes wrong with a request, in the shape that OpenAI's clients read."""

from sheepop.utils.errors import SheepopError

BAD_REQUEST, TOO_MANY, CLIENT_GONE, INTERNAL, UNAVAILABLE = 400, 429, 499, 500, 503  # 499 is seen in logs alone
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    TOO_MANY: "rate_limit_error",
    INTERNAL: "server_error",
    UNAVAILABLE: "server_error",
}


class ApiError(SheepopError):
    """A request that is not answered as it was meant.

    Attributes:
        message: one paragraph: what is wrong, where, and what to do.
        status: of HTTP.
        param: the field that is wrong, where it is one.
        code: a word for programs.
    """

    def __init__(
        self, message: str, *, status: int = BAD_REQUEST, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return what the client gets."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
