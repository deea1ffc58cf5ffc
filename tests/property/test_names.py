"""Keys and labels of any text."""

from __future__ import annotations

from hypothesis import assume, example, given
from hypothesis import strategies as st

from kathikon_celery.storage.names import MAX_KEY_BYTES, key, label, name_of, printable

#: Any text that Python knows, halves of surrogate pairs and NUL included, short or long.
texts = st.one_of(
    st.text(st.characters(), max_size=20),
    st.builds(lambda text, times: text * times, st.text(st.characters(), min_size=1, max_size=5), st.integers(1, 120)),
    st.text("#\"\0ud80 aé'\\", max_size=60),
)


@given(texts)
@example("#" + "0" * 40)
@example("x" * MAX_KEY_BYTES)
@example("x" * (MAX_KEY_BYTES + 1))
def test_a_key_is_short_and_any_database_keeps_it(name: str) -> None:
    made = key(name)
    assert len(made.encode()) <= MAX_KEY_BYTES
    assert "\0" not in made
    assert key(made) == made  # who has the row has a name that leads to it
    assert made == name or made.startswith("#")


@given(texts, texts)
def test_two_names_have_two_keys_and_two_labels(one: str, other: str) -> None:
    assume(one != other)
    assert key(one) != key(other)
    assert label(one) != label(other)


@given(texts)
@example('"')
@example('"a"')
def test_a_label_is_kept_by_any_database_and_gives_the_name_back(name: str) -> None:
    assert name_of(label(name)) == name
    assert printable(label(name)) == label(name)


@given(st.none() | texts)
def test_printable_changes_only_what_must_change(text: str | None) -> None:
    shown = printable(text)
    if shown is None:
        assert text is None
        return
    assert text is not None
    shown.encode()
    assert "\0" not in shown
    assert printable(shown) == shown
    if "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text):
        assert shown == text
