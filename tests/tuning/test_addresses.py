"""Addresses of databases in messages: without passwords, with the package that brings a missing driver."""

from __future__ import annotations

import importlib.util
import re
import traceback
from typing import Any

import pytest

from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.tuning.addresses import complete_address, shown, without_passwords
from lightning_mtl.tuning.storage import open_storage


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ann:hush@host/db",
        "postgresql+psycopg2://ann:hush@host:5432/db",
        "postgresql://ann:%68ush%40hush@host/db",
        "mysql+pymysql://ann:hush@hush@host/db",
        "mysql://:hush/hush@host/db",
        "postgresql://ann:hush@hush:hush@host/db",
        "postgresql://ann:hush hush@host/db",
        "postgresql://host/db?user=ann&password=hush",
        "postgresql://host/db?sslpassword=hush&x=1",
        "oracular://ann:hush@host/db",
        "postgresql://ann:hush@host:port/db",
        "postgresql:/ann:hush@host/db://",
        "ann:hush@host/db",
        "cockroach://ann:hush@@host",
    ],
)
def test_no_message_of_an_unusable_storage_shows_its_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drivers, as here, and by whatever else goes wrong first."""
    with pytest.raises(ConfigurationError) as raised:
        open_storage(address, 60)
    text = "".join(traceback.format_exception(raised.value))
    assert "hush" not in text.replace("%68ush", "hush")
    assert "\n" not in str(raised.value)


def test_texts_of_all_kinds() -> None:
    address = "postgresql://ann:s%40cret@host/db"
    for text in (address, f"could not open {address!r}", "wrong: s@cret", "wrong: 's%40cret'", f"--x={address}"):
        assert "cret" not in without_passwords(text, address)
    assert "cret" not in without_passwords(f"two: {address} and mysql://bob:cret@h/d?ssl_passwd=cret")
    for harmless in ("sqlite:///study.db", "postgresql://ann@host/db", "journal:///study.journal"):
        assert shown(harmless) == without_passwords(harmless, harmless) == harmless
    assert without_passwords("see https://optuna.org: it's all @home") == "see https://optuna.org: it's all @home"


def install(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)


def test_an_address_without_a_driver_takes_the_one_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "postgresql://ann:s%40%7Bcret@host/db?a=1"
    install(monkeypatch, "psycopg", "psycopg2", "pymysql")
    assert complete_address(address) == address.replace("postgresql:", "postgresql+psycopg:")
    install(monkeypatch, "psycopg2", "pymysql")
    assert complete_address(address) == address.replace("postgresql:", "postgresql+psycopg2:")
    assert complete_address("mysql://ann@host/db") == "mysql+pymysql://ann@host/db"
    assert complete_address("mariadb://ann@host/db") == "mariadb+pymysql://ann@host/db"
    for named in ("postgresql+asyncpg://host/db", "sqlite:///study.db", "oracle://host/db"):
        assert complete_address(named) == named


@pytest.mark.parametrize(
    ("address", "driver", "package"),
    [
        ("postgresql://host/db", "psycopg or psycopg2", "'psycopg[binary]'"),
        ("postgresql+psycopg2://host/db", "psycopg2", "'psycopg[binary]'"),
        ("mysql://host/db", "MySQLdb or pymysql", "pymysql"),
        ("mariadb+pymysql://host/db", "pymysql", "pymysql"),
    ],
)
def test_a_missing_driver_names_the_package(
    address: str, driver: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    modules: Any = __import__("sys").modules
    for module in ("psycopg", "psycopg2", "MySQLdb", "pymysql"):
        monkeypatch.setitem(modules, module, None)
    expected = rf"its driver {driver} is not installed; pip install {re.escape(package)} brings one\.$"
    with pytest.raises(ConfigurationError, match=expected):
        open_storage(address, 60)
