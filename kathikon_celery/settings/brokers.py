"""Which databases an app's broker settings name, in every form that Celery and kombu take for a broker."""

from __future__ import annotations

import re
from typing import Any

from kathikon_celery.settings import SettingError, checked_url, mask

_BY_SETTINGS = re.compile(r"kathikon:(//(localhost)?/*)?")


def broker_urls(value: Any) -> list[str]:
    """Return the URLs in a broker setting: a text, several with ``;`` between them, or a list of them."""
    given = value.split(";") if isinstance(value, str) else list(value or ())
    return [str(url) for url in given if url]


def is_kathikon(value: Any) -> bool:
    """Whether a broker setting names Kathikon; of several brokers, whether the first one is."""
    urls = broker_urls(value)
    return bool(urls) and urls[0].startswith("kathikon")


def broker_of(conf: Any) -> Any:
    """Return an app's broker: ``broker_read_url``, or ``broker_write_url`` if only that one is Kathikon's.

    >>> app = Celery(broker="kathikon+sqlite:///jobs.db")
    >>> broker_of(app.conf)
    'kathikon+sqlite:///jobs.db'
    """
    read, write = conf.broker_read_url, conf.broker_write_url
    return write if is_kathikon(write) and not is_kathikon(read) else read


def databases_of(value: Any, setting: str = "broker_url") -> tuple[str, ...]:
    """Return the URLs of the databases in a broker setting; none if ``kathikon_database_url`` names the database.

    Of several PostgreSQL servers, the first one that can be reached and written to is used.

    Raises `SettingError`, naming the *setting*, for a database that Kathikon cannot use, and for several URLs that are
    not all PostgreSQL servers of Kathikon's.

    >>> databases_of("kathikon+sqlite:///jobs.db")
    ('sqlite:///jobs.db',)
    """
    given = broker_urls(value)
    if len(given) > 1 and any(map(is_kathikon, given)) and not all(map(_is_named, given)):
        raise SettingError(
            f"{setting} = {[mask(url) for url in given]!r}: allowed is a list in which each broker is Kathikon's"
            " and names its database, as in kathikon+postgresql://user:password@host/database"
        )
    found = list(dict.fromkeys(database for url in given if (database := _database(url, setting)) is not None))
    if len(found) > 1 and not all(url.startswith("postgresql") for url in found):
        raise SettingError(
            f"{setting} = {[mask(url) for url in given]!r}: allowed are several servers of PostgreSQL, which have the"
            " same data, or one file of SQLite"
        )
    return tuple(found)


def _is_named(url: str) -> bool:
    return url.startswith("kathikon+")


def _database(url: str, setting: str) -> str | None:
    if url.startswith("kathikon:"):
        if not _BY_SETTINGS.fullmatch(url):
            raise SettingError(
                f"{setting} = {mask(url)!r}: allowed is kathikon:// for the database that kathikon_database_url names,"
                " or one such as kathikon+sqlite:///kathikon.db or kathikon+postgresql://user:password@host/database"
            )
        return None
    if not _is_named(url):
        return None
    database = url.partition("+")[2]
    try:
        return checked_url(database)
    except ValueError as error:
        raise SettingError(f"{setting} = {mask(database)!r} after 'kathikon+': allowed is {error}") from None
