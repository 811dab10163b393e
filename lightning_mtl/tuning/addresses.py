"""Addresses of databases: shown without their passwords, and completed by a driver that is installed."""

from __future__ import annotations

import importlib.util
import re
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import sqlalchemy
from sqlalchemy.engine import URL

from lightning_mtl.configured.messages import ConfigurationError

HIDDEN = "***"
# A password reaches to the last @ of a word: an @ that was not encoded is one of its letters.
_IN_TEXT = re.compile(r"(?P<before>\w[\w+.-]*://[^\s:/@?]*:)[^\s]*(?=@)")
_IN_ADDRESS = re.compile(r"(?P<before>^(?:[\w+.-]*:/+|(?![\w+.-]*:/))[^:/@?]*:).*(?=@)", re.DOTALL)
_IN_QUERY = re.compile(r"(?P<before>[?&]\w*(?:pass|pwd|secret|token)\w*=)[^&\s'\"]*", re.IGNORECASE)
# What is tried for an address that names no driver: SQLAlchemy's name and the module, the extra that brings one.
_MYSQL = ({"mysqldb": "MySQLdb", "pymysql": "pymysql"}, "pymysql")
_DRIVERS = {
    "postgresql": ({"psycopg": "psycopg", "psycopg2": "psycopg2"}, "'psycopg[binary]'"),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}


def without_passwords(text: str, address: str = "") -> str:
    """Hide the passwords of every address in a text, and those of one address wherever they stand in it.

    Args:
        text: A message.
        address: The address that the message is about: drivers may repeat its password alone, encoded or not.

    Example:
        >>> without_passwords("cannot open postgresql://ann:s%40x@host/db?sslpassword=y")
        'cannot open postgresql://ann:***@host/db?sslpassword=***'
        >>> without_passwords("no user with s@x", "postgresql://ann:s%40x@host/db")
        'no user with ***'
    """
    for pattern in (_IN_TEXT, _IN_QUERY):
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def shown(address: str) -> str:
    """Return an address without its passwords.

    Example:
        >>> shown("mysql://ann:two words@host/db")
        'mysql://ann:***@host/db'
    """
    for pattern in (_IN_ADDRESS, _IN_QUERY):
        address = pattern.sub(rf"\g<before>{HIDDEN}", address)
    return address


def _secrets(address: str) -> set[str]:
    matches = [match for pattern in (_IN_ADDRESS, _IN_QUERY) for match in pattern.finditer(address)]
    found = [match.group().removeprefix(match["before"]) for match in matches]
    plain = {*found, *map(unquote, found), *map(unquote_plus, found)}
    return {form for text in plain for form in (text, quote(text, safe=""), quote_plus(text), repr(text)[1:-1])} - {""}


def has_password(address: str) -> bool:
    """Return whether an address holds a password."""
    return bool(_secrets(address))


def complete_address(address: str) -> str:
    """Complete the address of a database by a driver that is installed, where it names none.

    Raises:
        ConfigurationError: If it is no address, if its password holds an @ that is not encoded, so that a part of it
            would be taken for the host, or if no driver is installed.
    """
    url = _read(address)
    drivers, _ = _DRIVERS.get(url.drivername, ({}, ""))
    if not drivers:
        return address
    installed = [name for name, module in drivers.items() if importlib.util.find_spec(module)]
    if not installed:
        raise ConfigurationError(missing_driver(address, " or ".join(drivers.values())))
    return url.set(drivername=f"{url.drivername}+{installed[0]}").render_as_string(hide_password=False)


def _read(address: str) -> URL:
    try:
        url = sqlalchemy.make_url(address)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # Without the cause: the parser's message may repeat a part of the password.
        raise ConfigurationError(
            f"storage={shown(address)!r} is no address of a database; write it as "
            "postgresql://user:password@host:port/database, and in a password @ as %40, / as %2F, : as %3A."
        ) from None
    if url.password is not None and "@" in f"{url.host}{url.database}":
        raise ConfigurationError(
            f"storage={shown(address)!r} has more than one @; write the one in the password as %40."
        )
    return url


def missing_driver(address: str, driver: str) -> str:
    """Say which driver of a database is missing, and how to install one."""
    _, package = _DRIVERS.get(_read(address).get_backend_name(), ({}, ""))
    way = f"pip install {package} brings one" if package else "install it"
    return f"storage={shown(address)!r} names no usable database: its driver {driver} is not installed; {way}."
