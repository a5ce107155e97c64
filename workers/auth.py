"""The OAuth2 bearer token of a WebSocket handshake, as a dependency of an endpoint.

It runs before the endpoint's body, which may be before the handshake is answered. It only finds the token: to
check it is the application's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection

POLICY_VIOLATION = 1008
_NO_TOKEN = "a bearer token is required"  # noqa: S105 (words, not a password)


@dataclass(frozen=True)
class PasswordFlow:
    """Where tokens are had and for what, by the names of OpenAPI."""

    tokenUrl: str
    scopes: Mapping[str, str]
    refreshUrl: str | None = None


@dataclass(frozen=True)
class OAuthFlows:
    """The flows of the scheme; there is only the password flow."""

    password: PasswordFlow


@dataclass(frozen=True)
class OAuth2Model:
    """The security scheme as OpenAPI describes it."""

    flows: OAuthFlows
    description: str | None = None
    type_: str = field(default="oauth2", init=False)


class _PlainBearer:
    """What FastAPI's `OAuth2PasswordBearer` holds, for where FastAPI is not installed."""

    def __init__(
        self,
        tokenUrl: str,
        scheme_name: str | None = None,
        scopes: dict[str, str] | None = None,
        description: str | None = None,
        auto_error: bool = True,
    ) -> None:
        self.model = OAuth2Model(OAuthFlows(PasswordFlow(tokenUrl, dict(scopes or {}))), description)
        self.scheme_name = scheme_name or self.__class__.__name__
        self.auto_error = auto_error


if TYPE_CHECKING:
    from fastapi.security import OAuth2PasswordBearer as _Base
else:
    try:
        from fastapi.security import OAuth2PasswordBearer as _Base
    except ImportError:
        _Base = _PlainBearer


class WebSocketOAuth2PasswordBearer(_Base):
    """Gives an endpoint the bearer token of the header `Authorization`.

    In FastAPI, `token: Annotated[str, Depends(bearer)]`; in plain Starlette,
    `token = await bearer(websocket)`. Where FastAPI is installed this is one of its `OAuth2PasswordBearer`,
    and serves HTTP endpoints too.

    Args:
        token_url: Where clients get a token, for the documentation. `tokenUrl` is the same.
        scheme_name: The name of the security scheme in the documentation.
        scopes: The scopes of the scheme, with their descriptions.
        description: The description of the scheme.
        auto_error: Refuse a client without a token. If False it gets None for a token.

    Raises:
        TypeError: neither or both of `token_url` and `tokenUrl` are given.
    """

    def __init__(
        self,
        token_url: str | None = None,
        scheme_name: str | None = None,
        scopes: dict[str, str] | None = None,
        description: str | None = None,
        auto_error: bool = True,
        *,
        tokenUrl: str | None = None,
    ) -> None:
        if (token_url is None) == (tokenUrl is None):
            raise TypeError("give either token_url or tokenUrl, the address where clients get a token")
        super().__init__(
            tokenUrl=token_url or tokenUrl or "",
            scheme_name=scheme_name,
            scopes=scopes,
            description=description,
            auto_error=auto_error,
        )

    async def __call__(self, websocket: HTTPConnection) -> str | None:
        """The token alone, without `Bearer`; None without one if not `auto_error`.

        Raises:
            starlette.exceptions.WebSocketException: there is no token, but another scheme, an empty token or
                nothing. The application closes with 1008, which before accept is HTTP 403; the code that
                waits for the token does not go on.
            starlette.exceptions.HTTPException: 401, the same for an HTTP request.
        """
        token = bearer_token(websocket.headers.getlist("authorization"))
        if token is not None or not self.auto_error:
            return token
        if websocket.scope["type"] == "websocket":
            raise WebSocketException(code=POLICY_VIOLATION, reason=_NO_TOKEN)
        raise HTTPException(status_code=401, detail=_NO_TOKEN, headers={"WWW-Authenticate": "Bearer"})


# FastAPI reads this annotation to know what to pass. It cannot resolve one in a string here, as it looks for
# names where the callable was defined, and an object that is called does not tell.
WebSocketOAuth2PasswordBearer.__call__.__annotations__["websocket"] = HTTPConnection


def bearer_token(headers: list[str]) -> str | None:
    """The token in the values of the header `Authorization` (RFC 6750 section 2.1), None if there is none.

    Two such headers are no answer to who the client is, and give None.
    """
    if len(headers) != 1:
        return None
    words = headers[0].split()
    if len(words) != 2 or words[0].lower() != "bearer":
        return None
    return words[1]
