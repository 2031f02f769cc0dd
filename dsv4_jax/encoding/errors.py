"""What goes wrong in a conversation or a completion, said in terms of the caller's input."""


class EncodingError(ValueError):
    """A conversation that cannot be rendered.

    `where` names the offending field (`messages[2].content`); `code` is the API error code a server
    reports with it: `invalid_value`, `invalid_message_order`, `invalid_schema` or
    `unsupported_content_type`.
    """

    def __init__(self, where: str, problem: str, code: str = "invalid_value") -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.code = code


class CompletionError(ValueError):
    """A completion that breaks the output grammar at character `position`."""

    def __init__(self, problem: str, position: int) -> None:
        super().__init__(f"completion, character {position}: {problem}")
        self.position = position
