"""Messages in one line, without secrets."""

import pytest

from cluster.errors import without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("API call to http://alice:S3cret@127.0.0.1:9/api failed", "API call to http://***@127.0.0.1:9/api failed"),
        ("'https://token@host/x', a@b", "'https://***@host/x', a@b"),
        ("s3://key:abc/def/gh@bucket/runs", "s3://***@bucket/runs"),
        ("http://alice:p@ss@host", "http://***@host"),
        ("x://u:p@a y://v:q@b", "x://***@a y://***@b"),
        ("s3://bucket/me@work/runs", "s3://bucket/me@work/runs"),
        ("https://host:5000/api", "https://host:5000/api"),
        ("postgresql:// and me@host", "postgresql:// and me@host"),
    ],
)
def test_credentials_are_left_out_of_urls(text, shown):
    assert without_credentials(text) == shown
