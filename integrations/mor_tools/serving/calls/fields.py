"""The fields of a body: JSON values, checked one by one."""

import json
from collections.abc import Collection, Mapping
from reprlib import repr as shortened
from typing import Any, NoReturn


class BadRequestError(Exception):
    """The body is invalid, or requests something that is not supported.

    Args:
        parameter: the field that is to blame.
        status: the HTTP status of the response.
    """

    def __init__(self, message: str, parameter: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter, self.status = parameter, status


def json_value(body: bytes | bytearray) -> object:
    """The JSON value of a body.

    Raises:
        BadRequestError: the body is not valid JSON, or has text that cannot be encoded.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_number)
        # JSON can contain half of a surrogate pair as an escape sequence, which neither tokenizers
        # nor responses can encode.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply.") from error
    except UnicodeError as error:
        raise BadRequestError(f"the body is not valid Unicode: {error.reason}.") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}.") from error
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


class Fields:
    """The fields of a JSON object, which are taken out one by one.

    Raises:
        BadRequestError: the body is no JSON object.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        values = json_value(body)
        if not isinstance(values, dict):
            raise BadRequestError("the body must be a JSON object.")
        self.values: dict[str, Any] = values

    def take(self, name: str, kind: type, default: Any) -> Any:
        """Take a value out, which must be of this kind.

        Raises:
            BadRequestError: it is of another kind.
        """
        value = self.values.pop(name, None)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError as error:
                raise BadRequestError(f"{name}={shortened(value)} is too large.", name) from error
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRequestError(f"{name}={shortened(value)}: expected {kind.__name__}.", name)
        return value

    def take_int(self, name: str, allowed: range, default: int | None) -> Any:
        """Take an integer out, which must lie in a range.

        Raises:
            BadRequestError: it does not.
        """
        value = self.take(name, int, default)
        if value is not None and value not in allowed:
            raise BadRequestError(
                f"{name}={shortened(value)} must be in {allowed.start}..{allowed.stop - 1}.", name
            )
        return value

    def refuse(self, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        """Take fields out that are not supported.

        Args:
            unsupported: their names, with the values that have no effect and are therefore allowed.

        Raises:
            BadRequestError: a field has another value.
        """
        for name, allowed in unsupported.items():
            value = self.values.pop(name, None)
            if value not in allowed:
                raise BadRequestError(
                    f"{name}={shortened(value)} is not supported. Leave it out.", name
                )

    def finish(self, ignored: Collection[str]) -> None:
        """Check that nothing is left but fields that are ignored.

        Raises:
            BadRequestError: there is an unknown field.
        """
        unknown = sorted(set(self.values) - set(ignored))
        if unknown:
            names = ", ".join(map(shortened, unknown[:4]))
            raise BadRequestError(f"unknown parameter {names}.", unknown[0][:80])
